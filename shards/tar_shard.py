"""One shard as a plain WebDataset tar, written through webdataset, with DALI's ``.idx`` beside it."""

import json
import tarfile
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

import xxhash

from maestri.shards.rows import Rows, Sample

LABEL, LABELS = "cls", "json"
_BUFFER = 1 << 20
DALI_INDEX_VERSION = "v1.2"
TAR_FORMAT: Final = tarfile.PAX_FORMAT
"""It holds names of any length; so does GNU's, but DALI's ``wds2idx`` then finds wrong offsets."""


class TarShard:
    """A tar in the making; nothing is synced.

    Bytes depend on the samples alone: modification time, user and group are 0.
    """

    def __init__(self, path: Path) -> None:
        """Makes the file."""
        from maestri.shards.webdataset_writer import TarWriter  # slow, and only workers need it

        self.rows = Rows()
        self._lines: list[str] = []
        self._file = _Sink(path.open("wb", buffering=_BUFFER))
        self._writer = TarWriter(self._file, user="", group="", mtime=0, encoder=False)
        self._writer.tarstream.format = TAR_FORMAT  # it takes an argument for this and does not pass it on
        self._writer.tarstream.copybufsize = _BUFFER  # or each image is copied in pieces of 16 KiB
        self._writer.tarstream.fileobj = self._file  # or tarfile's own stream copies its rest anew every 10 KiB

    def __enter__(self) -> "TarShard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.is_broken |= error is not None
        try:
            self._writer.close()
        except BaseException:
            self._file.is_broken = True
            raise
        finally:
            self._file.close()

    def add(self, sample: Sample) -> None:
        """Writes a sample."""
        image = sample.image
        members: list[tuple[str, bytes]] = [(image.extension, image.data)]
        if sample.labels is not None:
            members.insert(0, (LABELS, json.dumps({"labels": sample.labels}).encode()))
        elif sample.label >= 0:
            members.insert(0, (LABEL, str(sample.label).encode()))
        parts = []
        for extension, data in members:
            self._writer.write({"__key__": sample.key, extension: data})
            padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            offset = self._writer.tarstream.offset - padded
            parts.append(f"{extension} {offset} {len(data)} {sample.key}.{extension}")
        self._lines.append(" ".join(parts))
        self.rows.add(sample, offset=offset)

    @property
    def dali_index(self) -> str:
        """The content of its ``.idx``."""
        return _dali_index_of(self._lines)

    @property
    def xxh128(self) -> str:
        """Checksum of the whole file, hexadecimal; after it was closed."""
        return self._file.hash.hexdigest()


class _Sink:
    """A file that knows its checksum, and takes nothing once broken: tarfile writes its rest even after an error."""

    def __init__(self, file: BinaryIO) -> None:
        self.hash = xxhash.xxh3_128()
        self.is_broken = False
        self._file = file

    def write(self, data: bytes) -> int:
        if self.is_broken:
            return len(data)
        self.hash.update(data)
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()


def _dali_index_of(lines: list[str]) -> str:
    return "\n".join([f"{DALI_INDEX_VERSION} {len(lines)}", *lines]) + "\n"
