"""One shard as a plain WebDataset tar, written through webdataset, with DALI's ``.idx`` beside it."""

import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from maestri.shards.images import StoredImage

IMAGE, LABEL = "jpg", "cls"
DALI_INDEX_VERSION = "v1.2"
TAR_FORMAT = "GNU_FORMAT"
"""Unlike ustar, it holds names of any length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sample to write."""

    key: str
    """Without dots and blanks."""
    label: int
    """−1 for none; then no ``.cls`` member is written."""
    image: StoredImage
    """The image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenTar:
    """What there is to know about a tar that was just written."""

    columns: dict[str, NDArray[Any]]
    """Its rows of the index, but ``key_bytes`` (the size of each key) stands in for ``key_end``."""
    dali_index: str
    """The content of its ``.idx``."""


def write_tar(path: Path, samples: Iterable[Sample]) -> WrittenTar:
    """Writes a tar and returns where its images lie; nothing is synced.

    Bytes depend on the samples alone: modification time, user and group are 0.
    """
    from maestri.shards.webdataset_writer import TarWriter  # slow, and only workers need it

    rows: list[tuple[int, ...]] = []
    keys: list[bytes] = []
    lines: list[str] = []
    with path.open("wb") as file:
        sink = _Sink(file)
        writer = TarWriter(sink, user="", group="", mtime=0, encoder=False, format=TAR_FORMAT)
        try:
            for sample in samples:
                image = sample.image
                label = str(sample.label).encode() if sample.label >= 0 else None
                members = [(IMAGE, image.data)] if label is None else [(LABEL, label), (IMAGE, image.data)]
                parts = []
                for extension, data in members:
                    writer.write({"__key__": sample.key, extension: data})
                    padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    offset = writer.tarstream.offset - padded
                    parts.append(f"{extension} {offset} {len(data)} {sample.key}.{extension}")
                lines.append(" ".join(parts))
                rows.append((
                    offset, len(image.data), image.width, image.height, image.orientation,
                    image.stored, sample.label, zlib.crc32(image.data),
                ))  # fmt: skip
                keys.append(sample.key.encode())
        except BaseException:
            sink.is_broken = True
            raise
        finally:
            writer.close()
    names = ("offset", "bytes", "width", "height", "orientation", "stored", "label", "crc32")
    table = np.array(rows, np.int64).reshape(-1, len(names))
    columns: dict[str, NDArray[Any]] = {name: table[:, at] for at, name in enumerate(names)}
    columns["key_bytes"] = np.array([len(key) for key in keys], np.int64)
    columns["keys"] = np.frombuffer(b"".join(keys), np.uint8)
    return WrittenTar(columns=columns, dali_index=_dali_index_of(lines))


class _Sink:
    """A file that takes nothing once it is broken: tarfile writes its rest even after an error."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.is_broken = False

    def write(self, data: bytes) -> int:
        return len(data) if self.is_broken else self._file.write(data)


def _dali_index_of(lines: list[str]) -> str:
    return "\n".join([f"{DALI_INDEX_VERSION} {len(lines)}", *lines]) + "\n"


def dali_index(tar: Path) -> str:
    """Returns DALI's index of a tar: a line per sample with extension, offset, size and name of each member.

    The format is that of DALI's ``wds2idx`` 1.2; ``fn.readers.webdataset`` reads it.
    """
    groups: list[tuple[str, list[str]]] = []
    with tarfile.open(tar, "r:") as archive:
        for member in archive:
            stem, _, extension = member.name.partition(".")
            if not groups or groups[-1][0] != stem:
                groups.append((stem, []))
            groups[-1][1].append(f"{extension} {member.offset_data} {member.size} {member.name}")
            archive.members = []  # type: ignore[attr-defined]  # or it remembers every member
    return _dali_index_of([" ".join(parts) for _, parts in groups])
