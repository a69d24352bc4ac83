"""A set of shards, opened without scanning it."""

import os
import threading
import zlib
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from maestri.shards.errors import ShardCorrupt, ShardError
from maestri.shards.index import FILE_NAME, Columns, open_columns
from maestri.shards.manifest import Manifest

__all__ = ["ShardCorrupt", "ShardError", "ShardSet"]


class ShardSet:
    """Stored images by row: the index in memory-mapped columns, the bytes by ``pread``.

    Safe to use from several threads and after a fork: file descriptors have no position of their own in use.
    """

    def __init__(self, folder: Path, manifest: Manifest, columns: Columns) -> None:
        """Use ``open``."""
        self.folder = folder
        self.manifest = manifest
        self.columns = columns
        self._handles: dict[int, int] = {}
        self._lock = threading.Lock()

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
        columns = open_columns(folder / FILE_NAME, manifest.index.get("columns", {}), manifest.num_samples)
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

    def __enter__(self) -> "ShardSet":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the shards' files."""
        with self._lock:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()

    def label(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns labels, int64; −1 for none."""
        return self.columns.label[rows].astype(np.int64)

    def key(self, row: int) -> str:
        """Returns a sample's key."""
        start = int(self.columns.key_end[row - 1]) if row else 0
        return bytes(self.columns.keys[start : int(self.columns.key_end[row])]).decode()

    def read(self, rows: NDArray[np.int64]) -> list[bytes]:
        """Returns the stored bytes of the rows' images, unchecked.

        Raises:
            ShardCorrupt: a shard ends before an image does.
            OSError: the storage failed.
        """
        columns = self.columns
        shards, offsets, sizes = (column[rows].tolist() for column in (columns.shard, columns.offset, columns.bytes))
        found = []
        for row, shard, offset, size in zip(rows, shards, offsets, sizes, strict=True):
            data = os.pread(self._handle(shard), size, offset)
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

    def _handle(self, shard: int) -> int:
        handle = self._handles.get(shard)
        if handle is None:
            with self._lock:
                handle = self._handles.get(shard)
                if handle is None:
                    handle = self._handles[shard] = os.open(self._path(shard), os.O_RDONLY | os.O_CLOEXEC)
        return handle
