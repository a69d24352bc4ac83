"""Encoded samples read and checked, with a stand-in for each bad one."""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maestri.pipelines.header import BadHeader, image_size
from maestri.pipelines.stages import Stages
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
    """Reads samples of a ShardSet; checks CRC-32, header, size and end marker before a decoder sees the bytes.

    Samples are numbered 0, 1, 2, … in the order of the selected rows.  A bad one is replaced by the next good one
    (number + 1, + 2, …, from the last back to the first): the same on every rank and after every resume.  Each is
    logged once, with its shard and key, and counted once.  (Where DALI decodes a single view's window alone, whether an
    image is damaged may depend on the window, and so on what this rank has met.)
    """

    def __init__(
        self,
        shard_set: ShardSet,
        *,
        num_rows: int,
        max_bad: int,
        selected: NDArray[np.int64] | None = None,
        num_threads: int = 1,
        stages: Stages | None = None,
    ) -> None:
        """Reads ``selected`` rows, or rows [0, num_rows); more than ``max_bad`` bad ones are an error.

        Args:
            shard_set: the samples.
            num_rows: how many rows there are to read.
            max_bad: different bad samples that are replaced before it is an error.
            selected: the rows, ascending; None for the first ``num_rows``.
            num_threads: threads that read at once.
            stages: where it notes what it is at.
        """
        self._shard_set = shard_set
        self._num_rows = num_rows
        self._max_bad = max_bad
        self._selected = selected
        self._stages = stages or Stages()
        self._num_threads = num_threads
        self._bad: set[int] = set()
        # The CRC-32 ties a row to its bytes, so a header needs to be parsed only when its row is first read.
        self._parsed = np.zeros(len(shard_set), np.bool_)

    @property
    def num_bad(self) -> int:
        """Different bad rows met so far."""
        return len(self._bad)

    def read(self, numbers: NDArray[np.int64]) -> Samples:
        """Returns the samples of these numbers.

        Raises:
            TooManyBadSamples: the budget of bad rows is spent.
            OSError: the storage failed.
        """
        rows = numbers if self._selected is None else self._selected[numbers]
        with self._stages.at("read", self._where(rows)):
            try:
                encoded = self._read_all(rows)
            except (ShardCorrupt, BadHeader):
                good = [self._good_row(int(number)) for number in numbers]
                rows, encoded = np.array([row for row, _ in good], np.int64), [data for _, data in good]
        return self._samples(rows, encoded)

    def replace(self, samples: Samples, bad: Mapping[int, str]) -> Samples:
        """Returns the samples with others in the place of those that can't be decoded.

        Args:
            samples: from ``read``.
            bad: number in ``samples`` → why it can't be decoded.

        Raises:
            TooManyBadSamples: the budget of bad rows is spent.
            OSError: the storage failed.
        """
        rows, encoded = samples.rows.copy(), list(samples.encoded)
        for at, reason in bad.items():
            self._note_bad(int(rows[at]), reason)
        for at in bad:
            rows[at], encoded[at] = self._good_row(self._number_of(int(rows[at])))
        return self._samples(rows, encoded)

    def _samples(self, rows: NDArray[np.int64], encoded: list[NDArray[np.uint8]]) -> Samples:
        columns = self._shard_set.columns
        return Samples(
            rows=rows,
            encoded=encoded,
            widths=columns.width[rows].astype(np.int64),
            heights=columns.height[rows].astype(np.int64),
        )

    def _where(self, rows: NDArray[np.int64]) -> str:
        """Returns the shards that rows lie in, for people."""
        shards = np.unique(self._shard_set.columns.shard[rows]).tolist()
        return f"{len(rows)} samples of shard{'s' if len(shards) > 1 else ''} {', '.join(map(str, shards[:4]))}" + (
            " …" if len(shards) > 4 else ""
        )

    def _number_of(self, row: int) -> int:
        return row if self._selected is None else int(np.searchsorted(self._selected, row))

    def _read_all(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Returns the checked bytes of all rows; raises at the first bad one."""
        if self._num_threads == 1 or len(rows) < 2 * self._num_threads:
            return self._read_part(rows)
        parts = np.array_split(rows, self._num_threads)
        found: list[list[NDArray[np.uint8]] | Exception] = [[]] * len(parts)

        def read(number: int) -> None:
            try:
                found[number] = self._read_part(parts[number])
            except Exception as error:  # raised below
                found[number] = error

        # Daemons, and not a pool's threads: the interpreter waits for those at its exit, even if the storage hangs.
        threads = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(len(parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        encoded = []
        for part in found:
            if isinstance(part, Exception):
                raise part
            encoded += part
        return encoded

    def _read_part(self, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        encoded = self._shard_set.read_checked(rows)
        columns = self._shard_set.columns
        for index in np.flatnonzero(~self._parsed[rows]):
            row = int(rows[index])
            found, stated = image_size(encoded[index]), (int(columns.width[row]), int(columns.height[row]))
            if found != stated:
                raise BadHeader(f"{found[0]} × {found[1]} pixels; the index says {stated[0]} × {stated[1]}")
            self._parsed[row] = True
        return [np.frombuffer(data, np.uint8) for data in encoded]

    def _good_row(self, number: int) -> tuple[int, NDArray[np.uint8]]:
        """Returns the row of this number, or the next good one after it, and its bytes."""
        for step in range(self._num_rows):
            place = (number + step) % self._num_rows
            candidate = self._row_of(place)
            if candidate in self._bad:
                continue
            try:
                return candidate, self._read_part(np.array([candidate], np.int64))[0]
            except (ShardCorrupt, BadHeader) as error:
                self._note_bad(candidate, str(error))
        reason = "no good sample is left"
        raise TooManyBadSamples(len(self._bad), self._max_bad, self._shard_set.key(self._row_of(number)), reason)

    def _row_of(self, number: int) -> int:
        return number if self._selected is None else int(self._selected[number])

    def _note_bad(self, row: int, reason: str) -> None:
        """Logs and counts a bad row."""
        if row in self._bad:
            return
        self._bad.add(row)
        key = self._shard_set.key(row)
        shard = int(self._shard_set.columns.shard[row])
        _logger.warning(
            "bad sample %s (row %d, shard %d) is replaced by the next good one: %s", key, row, shard, reason
        )
        if len(self._bad) > self._max_bad:
            raise TooManyBadSamples(len(self._bad), self._max_bad, key, reason)
