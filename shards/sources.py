"""What is converted: a folder of images, or an idx file."""

import gzip
import hashlib
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from maestri.shards.errors import ShardError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
)
"""Files of a folder that are taken for images; others are left alone."""
_IDX_UINT8 = 0x08


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """Everything about a source but the images themselves, in its own order."""

    keys: tuple[str, ...]
    """Unique; ``/`` separates folders, dots are escaped."""
    sizes: NDArray[np.int64]
    """Bytes of each image in the source; ``sample``."""
    labels: NDArray[np.int32]
    """Positions in ``class_names``; −1 for none; ``sample``."""
    class_names: tuple[str, ...]
    """Empty without labels."""

    def digest(self) -> str:
        """Returns a SHA-256 over all of it."""
        state = hashlib.sha256("\0".join(self.keys).encode())
        state.update("\0".join(self.class_names).encode() + b"\0")
        state.update(np.ascontiguousarray(self.sizes, "<i8").tobytes())
        state.update(np.ascontiguousarray(self.labels, "<i4").tobytes())
        return state.hexdigest()


class Source(Protocol):
    """Something that can be converted; pickled into worker processes."""

    @property
    def kind(self) -> str:
        """Its name in the manifest."""
        ...

    @property
    def path(self) -> Path:
        """Where it is."""
        ...

    def listing(self) -> Listing:
        """Returns the listing."""
        ...

    def load(self, sample: int) -> bytes | NDArray[np.uint8]:
        """Returns an image file's bytes, or grey pixels ``height width``."""
        ...

    def name(self, sample: int) -> str:
        """Returns what a user calls the image: its path in the source, or its number."""
        ...


def open_source(path: Path) -> Source:
    """Returns the source at a path.

    Raises:
        ShardError: there is nothing, or nothing that can be converted.
    """
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise ShardError(f"there is no {path}")
    if ".idx3-" in path.name or "-idx3-" in path.name or path.name.endswith((".idx3", ".idx")):
        return IdxSource(path)
    raise ShardError(f"{path} is neither a folder of images nor an idx3 file (such as train-images-idx3-ubyte.gz)")


class FolderSource:
    """A folder of images: a folder for each class, at any depth below it, or flat and without labels."""

    kind = "folder"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: list[str] | None = None

    def listing(self) -> Listing:
        """Returns the listing: classes are the first-level folders, sorted; files are sorted by path.

        Raises:
            ShardError: there are no images, or some stand beside class folders.
        """
        found = self._scan()
        if not found:
            raise ShardError(f"no images in {self.path}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
        files = [name for name, _ in found]
        tops = [PurePosixPath(name).parts[0] if "/" in name else "" for name in files]
        class_names = tuple(sorted({top for top in tops if top}))
        if class_names and "" in tops:
            stray = files[tops.index("")]
            raise ShardError(
                f"{self.path} has images beside class folders, the first is {stray}; move it into a class or away"
            )
        number = {name: label for label, name in enumerate(class_names)}
        return Listing(
            keys=_unique_keys(files),
            sizes=np.array([size for _, size in found], np.int64),
            labels=np.array([number.get(top, -1) for top in tops], np.int32),
            class_names=class_names,
        )

    def _scan(self) -> list[tuple[str, int]]:
        found = []
        try:
            for folder, subfolders, names in os.walk(self.path, onerror=_raise):
                subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
                for name in names:
                    path = Path(folder, name)
                    if path.suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                        found.append((path.relative_to(self.path).as_posix(), path.stat().st_size))
        except OSError as error:
            raise ShardError(f"cannot read the source: {error.strerror}: {error.filename}") from None
        found.sort()
        self._files = [name for name, _ in found]
        return found

    def load(self, sample: int) -> bytes:
        """Returns the file's bytes."""
        return (self.path / self.name(sample)).read_bytes()

    def name(self, sample: int) -> str:
        """Returns the file's path below the folder."""
        assert self._files is not None, "listing() comes first"
        return self._files[sample]


class IdxSource:
    """An idx3 file of grey images (MNIST's format), gzipped or not, with its labels file beside it."""

    kind = "idx"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pixels: NDArray[np.uint8] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_pixels": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)

    def listing(self) -> Listing:
        """Returns the listing; classes are ``0`` … up to the largest label.

        Raises:
            ShardError: the file is damaged, empty, or its labels don't fit.
        """
        pixels = self._images()
        if not len(pixels):
            raise ShardError(f"{self.path} holds no images")
        labels = self._labels(len(pixels))
        width = len(str(len(pixels) - 1))
        return Listing(
            keys=tuple(f"{sample:0{width}d}" for sample in range(len(pixels))),
            sizes=np.full(len(pixels), pixels[0].size, np.int64),
            labels=labels,
            class_names=tuple(str(label) for label in range(int(labels.max()) + 1)),
        )

    def load(self, sample: int) -> NDArray[np.uint8]:
        """Returns the image's pixels."""
        pixels: NDArray[np.uint8] = self._images()[sample]
        return pixels

    def name(self, sample: int) -> str:
        """Returns the image's number."""
        return f"{self.path.name}[{sample}]"

    def _images(self) -> NDArray[np.uint8]:
        if self._pixels is None:
            self._pixels = read_idx(self.path, dimensions=3)
        return self._pixels

    def _labels(self, count: int) -> NDArray[np.int32]:
        name = self.path.name.replace("images", "labels").replace("idx3", "idx1")
        stem = name.removesuffix(".gz")
        path = next((p for p in (self.path.with_name(stem), self.path.with_name(f"{stem}.gz")) if p.is_file()), None)
        if path is None or path == self.path:
            return np.full(count, -1, np.int32)
        labels = read_idx(path, dimensions=1)
        if len(labels) != count:
            raise ShardError(f"{path} has {len(labels)} labels for the {count} images of {self.path}")
        return labels.astype(np.int32)


def read_idx(path: Path, *, dimensions: int) -> NDArray[np.uint8]:
    """Returns the array in an idx file of unsigned bytes.

    Raises:
        ShardError: it is missing, damaged, or of another type or number of dimensions.
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, ValueError) as error:
        raise ShardError(f"{path} cannot be read: {error}") from None
    head = 4 + 4 * dimensions
    if len(data) < head or data[:4] != bytes((0, 0, _IDX_UINT8, dimensions)):
        raise ShardError(f"{path} is not an idx file of unsigned bytes in {dimensions} dimensions: {data[:4].hex(' ')}")
    shape = struct.unpack_from(f">{dimensions}I", data, 4)
    expected = head + int(np.prod(shape, dtype=np.int64))
    if len(data) != expected:
        raise ShardError(f"{path} has {len(data)} bytes; its head says {expected}")
    pixels: NDArray[np.uint8] = np.frombuffer(data, np.uint8, offset=head).reshape(shape)
    return pixels


def _raise(error: OSError) -> None:
    raise error


def _escaped(text: str) -> str:
    """Returns a key without dots: webdataset takes the extension from the first dot on."""
    return text.replace("%", "%25").replace(".", "%2E")


def _unique_keys(files: list[str]) -> tuple[str, ...]:
    """Returns paths without extension; files that differ only in it keep it, escaped."""
    stems = [_escaped(str(PurePosixPath(name).with_suffix(""))) for name in files]
    times = Counter(stems)
    return tuple(stem if times[stem] == 1 else _escaped(name) for stem, name in zip(stems, files, strict=True))
