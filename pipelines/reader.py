"""Encoded samples read and checked, with a stand-in for each bad one."""

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maestri.pipelines.header import BadHeader, image_size
from maestri.shards.errors import ShardCorrupt
from maestri.shards.shard_set import ShardSet

_logger = logging.getLogger(__name__)


class TooManyBadSamples(RuntimeError):
    """More bad samples than allowed."""

    def __init__(self, num_bad: int, max_bad: int, key: str, reason: str) -> None:
        """Names the last bad sample and the budget it went past."""
        super().__init__(
            f"{num_bad} bad samples, and data.max_bad allows {max_bad}; the last: {key}: {reason}.  "
            "Convert the data set again, or raise data.max_bad"
        )
        self.num_bad = num_bad
        self.max_bad = max_bad
        self.key = key
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Checked samples, in order; all arrays over ``batch``."""

    rows: NDArray[np.int64]
    """Rows really read: a bad sample's place is taken by another row."""
    encoded: list[NDArray[np.uint8]]
    """The stored bytes of each image."""
    widths: NDArray[np.int64]
    """Of the stored images, in pixels."""
    heights: NDArray[np.int64]
    """Of the stored images, in pixels."""


class CheckedReader:
    """Reads rows of a ShardSet; checks CRC-32, header, size and end marker before a decoder sees the bytes.

    A bad row is replaced by the next good one (row + 1, + 2, …, from ``num_rows`` back to 0): the same on every rank
    and after every resume.  Each bad row is logged once, with its key, and counted once.
    """

    def __init__(self, shard_set: ShardSet, *, num_rows: int, max_bad: int) -> None:
        """Reads rows in [0, num_rows); more than ``max_bad`` bad ones are an error."""
        self._shard_set = shard_set
        self._num_rows = num_rows
        self._max_bad = max_bad
        self._bad: set[int] = set()
        # The CRC-32 ties a row to its bytes, so a header needs to be parsed only when its row is first read.
        self._parsed = np.zeros(num_rows, np.bool_)

    @property
    def num_bad(self) -> int:
        """Different bad rows met so far."""
        return len(self._bad)

    def read(self, rows: NDArray[np.int64]) -> Samples:
        """Returns the samples of the rows.

        Raises:
            TooManyBadSamples: the budget of bad rows is spent.
            OSError: the storage failed.
        """
        columns = self._shard_set.columns
        try:
            encoded = self._read_all(rows)
        except (ShardCorrupt, BadHeader):
            rows = np.array([self._good_row(int(row)) for row in rows], np.int64)
            encoded = self._read_all(rows)
        return Samples(
            rows=rows,
            encoded=encoded,
            widths=columns.width[rows].astype(np.int64),
            heights=columns.height[rows].astype(np.int64),
        )

    def _read_all(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Returns the checked bytes of all rows; raises at the first bad one."""
        encoded = self._shard_set.read_checked(rows)
        columns = self._shard_set.columns
        for index in np.flatnonzero(~self._parsed[rows]):
            row = int(rows[index])
            found, stated = image_size(encoded[index]), (int(columns.width[row]), int(columns.height[row]))
            if found != stated:
                raise BadHeader(f"{found[0]} × {found[1]} pixels; the index says {stated[0]} × {stated[1]}")
            self._parsed[row] = True
        return [np.frombuffer(data, np.uint8) for data in encoded]

    def _good_row(self, row: int) -> int:
        """Returns the row, or the next good one after it."""
        for step in range(self._num_rows):
            candidate = (row + step) % self._num_rows
            if candidate in self._bad:
                continue
            try:
                self._read_all(np.array([candidate], np.int64))
                return candidate
            except (ShardCorrupt, BadHeader) as error:
                self._note_bad(candidate, str(error))
        raise TooManyBadSamples(len(self._bad), self._max_bad, self._shard_set.key(row), "no good sample is left")

    def _note_bad(self, row: int, reason: str) -> None:
        """Logs and counts a bad row."""
        self._bad.add(row)
        key = self._shard_set.key(row)
        shard = int(self._shard_set.columns.shard[row])
        _logger.warning(
            "bad sample %s (row %d, shard %d) is replaced by the next good one: %s", key, row, shard, reason
        )
        if len(self._bad) > self._max_bad:
            raise TooManyBadSamples(len(self._bad), self._max_bad, key, reason)
