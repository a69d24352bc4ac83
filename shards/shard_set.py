"""A set of shards, opened without scanning it."""

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np
from isal.isal_zlib import crc32
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
        self._handles = Handles(
            [os.path.join(folder, manifest.base, shard.name) for shard in manifest.shards],  # noqa: PTH118  # many, fast
            [shard.bytes for shard in manifest.shards],
        )

    @classmethod
    def open(cls, folder: str | Path) -> "ShardSet":
        """Returns the set in a folder.

        Raises:
            ShardError: there is none, or it is damaged; shards are only looked for, not opened.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ShardError(f"there is no folder {folder}; make it with `maestri shards convert SOURCE {folder}`")
        manifest = Manifest.read(folder)
        columns = open_columns(folder / FILE_NAME, manifest.index["columns"], manifest.num_samples)
        base = folder / manifest.base
        try:
            with os.scandir(base) as entries:
                present = {entry.name for entry in entries}
        except OSError as error:
            raise ShardError(f"the shards of {folder} should be in {base}: {error.strerror}") from None
        missing = [shard.name for shard in manifest.shards if shard.name not in present]
        if missing:
            raise ShardError(f"{base} lacks {len(missing)} of {len(manifest.shards)} shards, the first is {missing[0]}")
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

    def path_of(self, shard: int) -> Path:
        """Returns the path of a shard."""
        return self.folder / self.manifest.base / self.manifest.shards[shard].name

    def label(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns labels, int64; −1 for none, the first where there are several."""
        return self.columns.label[rows].astype(np.int64)

    def multi_hot(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Returns whether each image has each label, ``row class``.

        Raises:
            ShardCorrupt: a label is none of the classes.
        """
        found = np.zeros((len(rows), len(self.manifest.class_names)), np.bool_)
        for at, row in enumerate(rows.tolist()):
            found[at, list(self.labels_of(row))] = True
        return found

    def labels_of(self, row: int) -> tuple[int, ...]:
        """Returns all labels of a sample.

        Raises:
            ShardCorrupt: one is none of the classes.
        """
        columns, num_classes = self.columns, len(self.manifest.class_names)
        if columns.label_end is None or columns.label_values is None:
            label = int(columns.label[row])
            if not -1 <= label < num_classes:
                raise self._wrong_label(row, label)
            return (label,) if label >= 0 else ()
        start = int(columns.label_end[row - 1]) if row else 0
        labels: tuple[int, ...] = tuple(columns.label_values[start : int(columns.label_end[row])].tolist())
        for label in labels:
            if not 0 <= label < num_classes:
                raise self._wrong_label(row, label)
        return labels

    def _wrong_label(self, row: int, label: int) -> ShardCorrupt:
        at = self.manifest.index["columns"]["label"]["offset"] + self.columns.label.itemsize * int(row)
        reason = f"label {label} of {self._shown(row)} is none of {len(self.manifest.class_names)} classes"
        return ShardCorrupt(self.folder / FILE_NAME, at, reason)

    def key(self, row: int) -> str:
        """Returns a sample's key."""
        start = int(self.columns.key_end[row - 1]) if row else 0
        return bytes(self.columns.keys[start : int(self.columns.key_end[row])]).decode(errors="replace")

    def _shown(self, row: int) -> str:
        """Returns a sample's key for an error, on one line whatever the index says."""
        return "".join(
            character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in self.key(row)
        )

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
                reason = f"{self._shown(int(row))} should be at {where}, which is not there"
                raise ShardCorrupt(self.folder / FILE_NAME, int(row), reason)
            data = self._handles.pread(shard, size, offset)
            if len(data) != size:
                reason = f"{self._shown(int(row))} should have {size} bytes, and {len(data)} are there"
                raise ShardCorrupt(self.path_of(shard), offset, reason)
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
            if crc32(data) != expected:
                reason = f"CRC-32 of {self._shown(int(row))} is wrong"
                raise ShardCorrupt(self.path_of(int(self.columns.shard[row])), int(self.columns.offset[row]), reason)
        return found
