"""What is left of a damaged set's manifest and index."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maestri.shards import adopt, index
from maestri.shards.errors import ShardError
from maestri.shards.finish import QUARANTINE_LIST
from maestri.shards.manifest import FILE_NAME, FORMAT_VERSION, FORMATS, Manifest, ShardInfo

_UNKNOWN = {
    "kept": "unknown: the manifest was lost",
    "transcoded": "unknown: the manifest was lost",
    "check": "unknown",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class OldRow:
    """A row of the old index."""

    crc32: int
    orientation: int
    stored: int
    labels: tuple[int, ...]


class OldSet:
    """What is left of a set's manifest and index."""

    def __init__(self, folder: Path) -> None:
        """Reads what can be read.

        Raises:
            ShardError: there is nothing.
        """
        self.folder = folder
        self.notes: list[str] = []
        self.manifest, self.is_whole = _salvaged(folder)
        self.columns: index.Columns | None = None
        self.is_half_repaired = False
        """Whether the index is that of a repair which was interrupted before it wrote the manifest."""
        if self.manifest is None:
            self.notes.append("the manifest is lost: where the set came from and what was stored are unknown")
            self.fields: dict[str, Any] = {
                "source": {"kind": "unknown", "name": folder.resolve().name},
                "images": _UNKNOWN,
                "seed": -1,
                "base": "",
            }
            self.class_names = _names_left(folder)
            self.paths = _shards_in(folder)
            self.infos: dict[str, ShardInfo] = {}
            self.columns = _columns_without_manifest(folder / index.FILE_NAME)
            counts = [] if self.columns is None else np.bincount(self.columns.shard).tolist()
            if len(counts) != len(self.paths):
                self.columns = None
                lost = "lost, too" if not counts else f"of {len(counts)} shards, and {len(self.paths)} are there"
                self.notes.append(f"the index is {lost}: images of tars have nothing to be compared with but a decoder")
            self._counts = dict(zip((path.name for path in self.paths), counts, strict=False))
            return
        if not self.is_whole:
            self.notes.append(
                "the manifest was damaged: class names and settings are taken as they stand in it; look at them"
            )
        names = ("source", "images", "seed", "base", "recipe")
        self.fields = {name: getattr(self.manifest, name) for name in names}
        self.class_names = self.manifest.class_names
        self.infos = {shard.name: shard for shard in self.manifest.shards}
        self.paths = [folder / self.manifest.base / name for name in self.infos]
        self._counts = {shard.name: shard.num_samples for shard in self.manifest.shards}
        try:
            layout = self.manifest.index["columns"]
            self.columns = index.open_columns(folder / index.FILE_NAME, layout, self.manifest.num_samples)
        except (ShardError, OSError):
            self._take_half_repaired()

    @property
    def is_adopted(self) -> bool:
        """Whether somebody else made its shards."""
        return bool(self.fields["source"].get("kind") == adopt.KIND)

    def member(self, name: str) -> str:
        """Returns which member or field holds ``image`` or ``label``, in shards of others; empty for the usual one."""
        return str(self.fields["source"].get(name, ""))

    def xxh128_of(self, name: str) -> str:
        """Returns what the checksum of a shard should be; empty if that is lost."""
        info = self.infos.get(name)
        return "" if info is None else info.xxh128

    def rows_of(self, name: str) -> "dict[int, OldRow]":
        """Returns the old rows of a shard by where their image starts."""
        if self.columns is None or name not in self._counts:
            return {}
        first = 0
        for other, count in self._counts.items():
            if other == name:
                break
            first += count
        rows = range(first, first + self._counts[name])
        names = ("offset", "crc32", "orientation", "stored")
        table = [np.array(getattr(self.columns, one)[first : rows.stop]).tolist() for one in names]
        return {
            row[0]: OldRow(crc32=row[1], orientation=row[2], stored=row[3], labels=self._labels_of(at))
            for at, *row in zip(rows, *table, strict=True)
        }

    def _take_half_repaired(self) -> None:
        """Takes an index that the manifest does not fit, if what is in it fits the shards that are there."""
        there = [path for path in self.paths if path.is_file()]
        columns = _columns_without_manifest(self.folder / index.FILE_NAME)
        counts = [] if columns is None else np.bincount(columns.shard).tolist()
        if counts and len(counts) == len(there):
            self.columns, self.is_half_repaired = columns, True
            self._counts = dict(zip((path.name for path in there), counts, strict=True))

    def _labels_of(self, row: int) -> tuple[int, ...]:
        columns = self.columns
        assert columns is not None
        if columns.label_end is None or columns.label_values is None:
            label = int(columns.label[row])
            return (label,) if label >= 0 else ()
        start = int(columns.label_end[row - 1]) if row else 0
        return tuple(columns.label_values[start : int(columns.label_end[row])].tolist())


def _columns_without_manifest(path: Path) -> index.Columns | None:
    """Returns the columns of an index whose manifest is lost: where they lie follows from what is in them."""
    try:
        mapped = np.memmap(path, np.uint8, "r")
        num_rows = int(mapped[8:16].view("<u8")[0])
        if not 0 < num_rows * 30 <= len(mapped):
            return None
        ends = index.layout_of(num_rows, key_bytes=0)["key_end"]["offset"] + 8 * num_rows
        key_bytes = int(mapped[ends - 8 : ends].view("<u8")[0])
        layout = index.layout_of(num_rows, key_bytes=key_bytes)
        if not _is_size_of(layout, len(mapped)):
            layout = index.layout_of(num_rows, key_bytes=key_bytes, num_labels=0)
            ends = layout["label_end"]["offset"] + 8 * num_rows
            num_labels = int(mapped[ends - 8 : ends].view("<u8")[0])
            layout = index.layout_of(num_rows, key_bytes=key_bytes, num_labels=num_labels)
        columns = index.open_columns(path, layout, num_rows) if _is_size_of(layout, len(mapped)) else None
    except (OSError, ValueError, IndexError, OverflowError):
        return None
    if columns is None or (np.diff(columns.shard.astype(np.int64)) < 0).any() or columns.shard.max() >= num_rows:
        return None
    return columns


def _is_size_of(layout: dict[str, dict[str, Any]], size: int) -> bool:
    last = max(layout.values(), key=lambda column: int(column["offset"]))
    end: int = last["offset"] + np.dtype(last["dtype"]).itemsize * last["length"]
    return -(-end // index.ALIGNMENT) * index.ALIGNMENT == size


def _salvaged(folder: Path) -> tuple[Manifest | None, bool]:
    """Returns what can be read of the manifest, and whether it is as it was written."""
    try:
        return Manifest.read(folder), Manifest.is_as_written(folder)
    except ShardError:
        version = _stored(folder).get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ShardError(f"{folder / FILE_NAME} is of another version, {version}; nothing was written") from None
        return None, False


def _stored(folder: Path) -> dict[str, Any]:
    """Returns the manifest as it stands in its file, if that is JSON at all."""
    try:
        stored = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _names_left(folder: Path) -> tuple[str, ...]:
    """Returns class names from a manifest that is otherwise of no use."""
    names = _stored(folder).get("class_names")
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _shards_in(folder: Path) -> list[Path]:
    for form in FORMATS:
        found = sorted(folder.glob(f"shard-*.{form}"))
        if found:
            return found
    raise ShardError(f"{folder} holds neither a manifest nor shards of ours; for those of others: maestri shards index")


def quarantined(folder: Path) -> list[dict[str, str]]:
    """Returns the entries of the list of images left out that can be read."""
    try:
        lines = (folder / QUARANTINE_LIST).read_text(encoding="utf-8").splitlines()
        return [entry for entry in map(json.loads, lines) if isinstance(entry, dict)]
    except (OSError, ValueError):
        return []
