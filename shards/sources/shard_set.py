"""One of our sets of shards as a source, so that it can be packed otherwise."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maestri.shards.errors import ShardCorrupt, ShardError
from maestri.shards.images import BadImage, require_size
from maestri.shards.index import FILE_NAME, wrong_row
from maestri.shards.keys import escaped
from maestri.shards.listing import Listing, Strings
from maestri.shards.shard_set import ShardSet


class ShardSetSource:
    """A set of shards; its images are compared with their CRC-32 as they are read."""

    kind = "shards"

    def __init__(self, path: Path) -> None:
        """Takes the set's folder; it is opened when first needed."""
        self.path = path
        self.files = (path,)
        self._set: ShardSet | None = None

    def __getstate__(self) -> dict[str, object]:
        """Leaves the open set out: a worker process opens it itself."""
        return self.__dict__ | {"_set": None}

    def listing(self) -> Listing:
        """Returns the listing: rows in the set's order, with its keys, labels and class names.

        Raises:
            ShardError: the set is damaged: keys or labels of a row cannot be.
        """
        opened = self._opened()
        columns, manifest = opened.columns, opened.manifest
        if problem := wrong_row(columns, len(manifest.class_names)):
            hint = f"`maestri shards verify {self.path} --repair` makes the index anew"
            raise ShardError(f"{self.path / FILE_NAME} is damaged: row {problem[0]}: {problem[1]}; {hint}")
        rows = np.arange(len(opened), dtype=np.int64)
        several = columns.label_end is not None and columns.label_values is not None
        return Listing(
            keys=_unique(Strings(np.array(columns.keys), columns.key_end.astype(np.int64))),
            names=Strings.of(f"{self.path.name}[{row}]" for row in range(len(opened))),
            places=np.stack([rows, columns.stored.astype(np.int64), columns.orientation.astype(np.int64)], 1),
            sizes=columns.bytes.astype(np.int64),
            labels=np.array(columns.label, np.int32),
            label_ends=np.array(columns.label_end, np.int64) if several else None,
            label_values=np.array(columns.label_values, np.int32) if several else None,
            class_names=manifest.class_names,
            content=str(manifest.index.get("xxh128", "")),
        )

    def load(self, name: str, place: NDArray[np.int64]) -> bytes:
        """Returns the stored bytes of a row.

        Raises:
            BadImage: they are not those that were stored, or too many.
            OSError: the storage failed.
        """
        opened = self._opened()
        require_size(int(opened.columns.bytes[place[0]]))
        try:
            return opened.read_checked(place[:1])[0]
        except ShardCorrupt as error:
            raise BadImage(f"{error.path.name}, byte {error.offset}: {error.reason}") from None

    def facts(self, place: NDArray[np.int64]) -> tuple[int, int]:
        """Returns what the stored bytes don't tell of a row: its ``stored`` code, and the source's EXIF orientation."""
        return int(place[1]), int(place[2])

    def _opened(self) -> ShardSet:
        if self._set is None:
            self._set = ShardSet.open(self.path)
        return self._set


def _unique(keys: Strings) -> Strings:
    """Returns the keys; those that occur again, as they may in shards of others, get their row's number."""
    seen: set[str] = set()
    found = []
    for row, key in enumerate(keys):
        safe = key if escaped(key.replace("%", "")) == key.replace("%", "") else escaped(key)
        while safe in seen:
            safe = f"{safe}-{row}"
        seen.add(safe)
        found.append(safe)
    return Strings.of(found)
