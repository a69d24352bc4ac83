"""Data sets in memory with the same methods as a ShardSet."""

import io
import zlib
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from maestri.shards.errors import ShardCorrupt


class FakeShardSet:
    """A ShardSet of encoded images in memory."""

    def __init__(self, encoded: list[bytes]) -> None:
        """Indexes the images as conversion would have."""
        sizes = [Image.open(io.BytesIO(data)).size for data in encoded]
        self.encoded = list(encoded)
        self.reads = 0
        self.manifest = SimpleNamespace(recipe="fake")
        self.columns = SimpleNamespace(
            shard=np.zeros(len(encoded), np.int32),
            width=np.array([width for width, _ in sizes], np.int32),
            height=np.array([height for _, height in sizes], np.int32),
            label=np.arange(len(encoded), dtype=np.int32) % 10,
            crc32=np.array([zlib.crc32(data) for data in encoded], np.uint32),
        )

    def __enter__(self) -> "FakeShardSet":
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Has nothing to close."""

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.encoded)

    def label(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the labels of the rows."""
        return self.columns.label[rows].astype(np.int64)

    def key(self, row: int) -> str:
        """Returns the key of a row."""
        return f"fake/{row:06d}"

    def read_checked(self, rows: NDArray[np.int64]) -> list[bytes]:
        """Returns stored bytes whose CRC-32 is right."""
        self.reads += len(rows)
        for row in rows:
            if zlib.crc32(self.encoded[row]) != self.columns.crc32[row]:
                raise ShardCorrupt("fake.tar", int(row), f"CRC-32 of {self.key(int(row))} is wrong")
        return [self.encoded[row] for row in rows]


def encode(image: Image.Image, **options: object) -> bytes:
    """Returns the image as a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def photo_like(rng: np.random.Generator, width: int, height: int, *, grey: bool = False) -> Image.Image:
    """Returns an image with smooth structure, edges and a little grain, as photographs have."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    planes = []
    for _ in range(3):
        frequency, phase = rng.uniform(4, 30, 4), rng.uniform(0, 6, 4)
        plane = sum(np.sin(f * (x * np.cos(p) + y * np.sin(p)) + p) for f, p in zip(frequency, phase, strict=True))
        plane = 128 + 30 * plane + 40 * ((x - rng.uniform(0.2, 0.8)) ** 2 + (y - 0.4) ** 2 < 0.05)
        planes.append(plane + rng.normal(0, 3, plane.shape))
    pixels = np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if grey else pixels)


@pytest.fixture(scope="session")
def make_photos() -> Callable[..., FakeShardSet]:
    """Makes a data set of photo-like images: sizes vary; chroma 4:4:4 or 4:2:0, or grey."""

    def make(count: int, *, kind: str = "4:2:0", seed: int = 0, smallest: int = 60, largest: int = 400) -> FakeShardSet:
        rng = np.random.default_rng(seed)
        encoded = []
        for _ in range(count):
            width, height = (int(side) for side in rng.integers(smallest, largest, 2))
            image = photo_like(rng, width, height, grey=kind == "grey")
            options = {} if kind == "grey" else {"subsampling": kind}
            encoded.append(encode(image, quality=92, **options))
        return FakeShardSet(encoded)

    return make


@pytest.fixture(scope="session")
def tiny_greys(make_photos: Callable[..., FakeShardSet]) -> FakeShardSet:
    """Forty grey images of 28 × 28."""
    return make_photos(40, kind="grey", smallest=28, largest=29)
