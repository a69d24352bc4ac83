"""An idx3 file of images (MNIST's format) as a source."""

import gzip
import hashlib
import logging
import math
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from maestri.shards.errors import ShardError
from maestri.shards.listing import Listing, Strings

_UINT8 = 0x08
_CHUNK = 1 << 24
_IMAGES = re.compile(r"(?P<split>.*?)[-_.]?images[-_.]idx3([-_.]ubyte)?(\.gz)?$")
_SPLIT_ALIASES = {"test": "t10k"}

_logger = logging.getLogger(__name__)


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class IdxSource:
    """An idx3 file of grey images, gzipped or not, with its labels file beside it."""

    kind = "idx"

    def __init__(self, path: Path) -> None:
        """Takes the file of images; it is read when first needed."""
        self.path = path
        self.files = (path,)
        self._pixels: NDArray[np.uint8] | None = None

    def __getstate__(self) -> dict[str, object]:
        """Leaves the pixels out: a worker process reads them itself."""
        return {**self.__dict__, "_pixels": None}

    def listing(self) -> Listing:
        """Returns the listing; classes are ``0`` … up to the largest label.

        Raises:
            ShardError: the file is damaged, empty, or its labels don't fit.
        """
        pixels = self._images()
        if not pixels.size:
            raise ShardError(f"{self.path} holds no images: its shape is {pixels.shape}")
        labels = self._labels(len(pixels))
        width = len(str(len(pixels) - 1))
        samples = np.arange(len(pixels), dtype=np.int64)
        return Listing(
            keys=Strings.of(f"{sample:0{width}d}" for sample in range(len(pixels))),
            names=Strings.of(f"{self.path.name}[{sample}]" for sample in range(len(pixels))),
            places=np.stack([samples, samples, samples], 1),
            sizes=np.full(len(pixels), pixels[0].size, np.int64),
            labels=labels,
            class_names=tuple(str(label) for label in range(int(labels.max()) + 1)),
            content=hashlib.sha256(pixels.data).hexdigest(),
        )

    def load(self, name: str, place: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Returns the pixels of the image with this number."""
        pixels: NDArray[np.uint8] = self._images()[place[0]]
        return pixels

    def _images(self) -> NDArray[np.uint8]:
        if self._pixels is None:
            self._pixels = read_idx(self.path, dimensions=3)
        return self._pixels

    def _labels(self, count: int) -> NDArray[np.int32]:
        name = self.path.name.replace("images", "labels").replace("idx3", "idx1")
        stem = name.removesuffix(".gz")
        path = next((p for p in (self.path.with_name(stem), self.path.with_name(f"{stem}.gz")) if p.is_file()), None)
        if path is None or path == self.path:
            _logger.warning("no file %s beside %s: the set has no labels", stem, self.path)
            return np.full(count, -1, np.int32)
        return read_idx(path, dimensions=1, labels_of=(self.path, count)).astype(np.int32)


def is_idx(path: Path) -> bool:
    """Returns whether a file says that it is an idx file of unsigned bytes, gzipped or not.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(4)
    if head[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path) as file:
                head = file.read(4)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            return path.name.removesuffix(".gz").endswith(("ubyte", "idx3"))  # reading it tells what is wrong
    return head[:3] == bytes((0, 0, _UINT8))


def idx_images_in(folder: Path, split: str) -> Path | None:
    """Returns the folder's idx3 file of a split, None where the folder holds no such files.

    Raises:
        ShardError: there are several, and the split names none of them.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), reverse=True):  # so that, of a file and its .gz, the file counts
        match = _IMAGES.fullmatch(path.name)
        if match and path.is_file():
            found[match["split"]] = path
    if not found:
        return None
    wanted = next((name for name in (split, _SPLIT_ALIASES.get(split, split)) if name in found), None)
    if wanted is None and len(found) == 1 and not split:
        wanted = next(iter(found))
    if wanted is None:
        names = " or ".join(f"--split {name}" for name in sorted(found))
        given = f"none is called '{split}'" if split else "say which"
        raise ShardError(f"{folder} holds {len(found)} idx3 files, {given}: {names}")
    return found[wanted]


def read_idx(path: Path, *, dimensions: int, labels_of: tuple[Path, int] | None = None) -> NDArray[np.uint8]:
    """Returns the array in an idx file of unsigned bytes: memory-mapped, or unpacked where it is gzipped.

    Args:
        path: of the file.
        dimensions: of the array.
        labels_of: the file of images whose labels these are, and how many it holds.

    Raises:
        ShardError: it is missing, damaged, or of another type, number of dimensions or labels.
    """
    try:
        with path.open("rb") as file:
            is_packed = file.read(2) == b"\x1f\x8b"
            size = os.fstat(file.fileno()).st_size
        with gzip.open(path) if is_packed else path.open("rb") as opened:
            head = opened.read(4 + 4 * dimensions)
            if len(head) < 4 + 4 * dimensions or head[:4] != bytes((0, 0, _UINT8, dimensions)):
                raise ShardError(
                    f"{path} is not an idx file of unsigned bytes in {dimensions} dimensions: {head[:4].hex(' ')}"
                )
            shape = struct.unpack_from(f">{dimensions}I", head, 4)
            if labels_of is not None and shape[0] != labels_of[1]:
                raise ShardError(f"{path} has {shape[0]} labels for the {labels_of[1]} images of {labels_of[0]}")
            expected = math.prod(shape)
            content = _read_up_to(opened, expected + 1) if is_packed else b""  # one more tells that there is more
    except (OSError, EOFError, zlib.error) as error:
        raise ShardError(f"{path} cannot be read: {error}") from None
    found = len(head) + len(content) if is_packed else size
    if found != len(head) + expected:
        more = "more than " if is_packed and found > len(head) + expected else ""
        count = found - bool(more)
        raise ShardError(f"{path} has {more}{count} bytes; its head says {len(head) + expected}")
    if is_packed or not expected:
        return np.frombuffer(content, np.uint8).reshape(shape)
    return np.memmap(path, np.uint8, "r", offset=len(head), shape=shape)


def _read_up_to(file: _Readable, size: int) -> bytes:
    """Returns the first bytes; never has more in memory than there are, whatever ``size`` says."""
    content = bytearray()
    while len(content) < size and (part := file.read(min(size - len(content), _CHUNK))):
        content += part
    return bytes(content)
