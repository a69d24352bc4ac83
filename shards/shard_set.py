"""A set of shards, opened without scanning it."""

import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from maestri.shards.errors import ShardCorrupt, ShardError
from maestri.shards.handles import Handles
from maestri.shards.index import FILE_NAME, Columns, open_columns
from maestri.shards.manifest import Manifest

__all__ = ["ShardCorrupt", "ShardError", "ShardSet"]


class ShardSet:
    """Stored images by row: the index in memory-mapped columns, the bytes by ``pread``.

    Safe to use from several threads and after a fork; pickled, it is opened anew.
    """

    def __init__(self, folder: Path, manifest: Manifest, columns: Columns) -> None:
        """Use ``open``."""
        self.folder = folder
        self.manifest = manifest
        self.columns = columns
        self._handles = Handles([folder / shard.name for shard in manifest.shards])

    @classmethod
    def open(cls, folder: str | Path) -> "ShardSet":
        """Returns the set in a folder.

        Raises:
            ShardError: there is none, or it is damaged; shards are only looked for, not read.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ShardError(f"there is no folder {folder}; make it with `maestri shards convert SOURCE {folder}`")
        manifest = Manifest.read(folder)
        columns = open_columns(folder / FILE_NAME, manifest.index["columns"], manifest.num_samples)
        for shard in manifest.shards:
            try:
                found = (folder / shard.name).stat().st_size
            except OSError as error:
                raise ShardError(f"{folder} lacks shard {shard.name}: {error.strerror}") from None
            if found != shard.bytes:
                raise ShardError(f"{folder / shard.name} has {found} bytes; its manifest says {shard.bytes}")
        return cls(folder, manifest, columns)

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __reduce__(self) -> "tuple[Callable[[Path], ShardSet], tuple[Path]]":
        return ShardSet.open, (self.folder,)

    def __enter__(self) -> "ShardSet":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the shards' files."""
        self._handles.close()

    def label(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns labels, int64; −1 for none."""
        return self.columns.label[rows].astype(np.int64)

    def key(self, row: int) -> str:
        """Returns a sample's key."""
        start = int(self.columns.key_end[row - 1]) if row else 0
        return bytes(self.columns.keys[start : int(self.columns.key_end[row])]).decode(errors="replace")

    def read(self, rows: NDArray[np.int64]) -> list[bytes]:
        """Returns the stored bytes of the rows' images, unchecked.

        Raises:
            ShardCorrupt: a shard ends before an image does, or the index points outside of it.
            OSError: the storage failed.
        """
        columns = self.columns
        infos = self.manifest.shards
        shards, offsets, sizes = (column[rows].tolist() for column in (columns.shard, columns.offset, columns.bytes))
        found = []
        for row, shard, offset, size in zip(rows, shards, offsets, sizes, strict=True):
            if shard >= len(infos) or offset + size > infos[shard].bytes:
                where = f"bytes {offset} to {offset + size} of shard {shard}"
                reason = f"{self.key(int(row))} should be at {where}, which is not there"
                raise ShardCorrupt(self.folder / FILE_NAME, int(row), reason)
            data = self._handles.pread(shard, size, offset)
            if len(data) != size:
                reason = f"{self.key(int(row))} should have {size} bytes, and {len(data)} are there"
                raise ShardCorrupt(self._path(shard), offset, reason)
            found.append(data)
        return found

    def read_checked(self, rows: NDArray[np.int64]) -> list[bytes]:
        """Returns the stored bytes of the rows' images after comparing their CRC-32 with the index.

        Raises:
            ShardCorrupt: an image's bytes are not those that were stored.
            OSError: the storage failed.
        """
        found = self.read(rows)
        for row, data, expected in zip(rows, found, self.columns.crc32[rows].tolist(), strict=True):
            if zlib.crc32(data) != expected:
                reason = f"CRC-32 of {self.key(int(row))} is wrong"
                raise ShardCorrupt(self._path(self.columns.shard[row]), int(self.columns.offset[row]), reason)
        return found

    def _path(self, shard: int) -> Path:
        return self.folder / self.manifest.shards[shard].name
