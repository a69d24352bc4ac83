"""Samples on their way into a shard, and the rows of the index that they leave behind."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from maestri.shards.images import StoredImage

NAMES = ("offset", "bytes", "width", "height", "orientation", "stored", "label", "crc32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sample to write."""

    key: str
    """Without dots and blanks."""
    label: int
    """−1 for none; then no ``.cls`` member is written."""
    labels: tuple[int, ...] | None = None
    """All of them, in sets whose images may have several; then they go into a ``.json`` member."""
    image: StoredImage
    """The image."""


@dataclass(slots=True)
class Rows:
    """Rows of the index, for one shard."""

    numbers: list[tuple[int, ...]] = field(default_factory=list)
    """``NAMES`` of each row."""
    keys: list[bytes] = field(default_factory=list)
    """In UTF-8."""
    labels: list[tuple[int, ...] | None] = field(default_factory=list)
    """All labels, where there may be several."""

    def add(self, sample: Sample, *, offset: int) -> None:
        """Adds a sample whose image starts at a byte of the shard."""
        image = sample.image
        self.numbers.append((
            offset, len(image.data), image.width, image.height, image.orientation,
            image.stored, sample.label, crc32(image.data),
        ))  # fmt: skip
        self.keys.append(sample.key.encode())
        self.labels.append(sample.labels)

    def columns(self) -> dict[str, NDArray[Any]]:
        """Returns the rows by column; ``key_bytes``, the size of each key, stands in for ``key_end``.

        So do ``num_labels`` and ``label_values`` where images may have several labels.
        """
        table = np.array(self.numbers, np.int64).reshape(-1, len(NAMES))
        columns: dict[str, NDArray[Any]] = {name: table[:, at] for at, name in enumerate(NAMES)}
        columns["key_bytes"] = np.array([len(key) for key in self.keys], np.int64)
        columns["keys"] = np.frombuffer(b"".join(self.keys), np.uint8)
        if any(labels is not None for labels in self.labels):
            columns["num_labels"] = np.array([len(labels or ()) for labels in self.labels], np.int64)
            columns["label_values"] = np.array([label for labels in self.labels for label in labels or ()], np.int32)
        return columns
