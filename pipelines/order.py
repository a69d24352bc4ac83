"""Which row stands at which global position: a pure function of the seed.

Epoch e is the range of positions [e·N, (e+1)·N); in it every one of the N rows comes exactly once.  The permutation is
computed, not stored: a place in an epoch is mapped by a keyed bijection of [0, N), so that reading any position costs
the same and needs no memory, at a thousand rows or at a hundred million.

The bijection: write p as (left, right) in the base of two numbers a·b ≥ N, a = ⌈√N⌉, b = ⌈N/a⌉; in eight alternating
rounds add to one half a keyed hash of the other, modulo the half's size (Black and Rogaway, "Ciphers with arbitrary
finite domains", CT-RSA 2002); where the result lies outside [0, N), apply it again ("cycle walking"), which a·b being
so close to N makes rare.

The windowed order uses it twice: on an epoch's shards, which are then taken some at a time, and on the rows of each
such window.  It needs a table of the shards for each epoch that is being read, and nothing for a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from maestri.pipelines.counter_rng import Purpose, check_seed, random_words

_ROUNDS = 8
_DRAWS = _ROUNDS // 2
"""A draw is four 32-bit words, so the keys of two rounds."""
_MIX = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
"""The multipliers of MurmurHash3's 64-bit finaliser."""
_RowsOf = Callable[[NDArray[np.int64]], NDArray[np.int64]]
_EPOCHS_KEPT = 4
"""A batch needs two at most; the others are for readers at several positions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderConfig:
    """How samples are shuffled."""

    kind: Literal["full", "windowed"] = "full"
    """``full``: a uniform shuffle of all rows, new in each epoch; ``windowed``: shards are shuffled, then the rows of
    ``window`` shards at a time, so that few files are read at once."""
    window: int = 64
    """Shards open at once, of ``windowed``; twice as many while a batch lies in two windows."""

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ValueError: a field is out of range.
        """
        if self.window < 1:
            raise ValueError(f"data.order.window is {self.window}; expected at least 1 shard")


def _hash(half: NDArray[np.uint64], key: NDArray[np.uint64], size: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Returns a keyed hash in [0, size) of each half."""
    mixed = half ^ key
    for multiplier in _MIX:
        mixed ^= mixed >> np.uint64(33)
        mixed *= multiplier
    mixed ^= mixed >> np.uint64(33)
    return ((mixed >> np.uint64(32)) * size) >> np.uint64(32)


def _permute_domain(
    offsets: NDArray[np.uint64], size_left: NDArray[np.uint64], size_right: NDArray[np.uint64], keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Returns the image of each number under the bijection of [0, a·b)."""
    left, right = np.divmod(offsets, size_right)
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left += _hash(right, key, size_left)
            left -= size_left * (left >= size_left)
        else:
            right += _hash(left, key, size_right)
            right -= size_right * (right >= size_right)
    return left * size_right + right


def _permuted(offsets: NDArray[np.int64], sizes: NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Returns the image of each offset under the keyed bijection of [0, size).

    Args:
        offsets: numbers in [0, size), ``place``.
        sizes: below 2⁶², ``place``, or one for all.
        keys: of the rounds, ``round place``, or one for all places.
    """
    most = (sizes - 1).astype(np.uint64)
    root = np.sqrt(most.astype(np.float64)).astype(np.uint64)
    root -= root * root > most  # ⌊√(size − 1)⌋: below 2⁶² the float is never too small, and may be too large
    size_left = root + np.uint64(1)
    size_right = most // size_left + np.uint64(1)
    result = _permute_domain(offsets.astype(np.uint64), size_left, size_right, keys)
    outside = np.flatnonzero(result > most)
    while outside.size:
        some_most, some_left, some_right, some_keys = (
            np.broadcast_to(array, (*array.shape[:-1], result.size))[..., outside]
            for array in (most, size_left, size_right, keys)
        )
        result[outside] = _permute_domain(result[outside], some_left, some_right, some_keys)
        outside = outside[result[outside] > some_most]
    return result.astype(np.int64)


def _round_keys(seed: int, epoch: int, numbers: NDArray[np.int64], *, first_draw: int = 0) -> NDArray[np.uint64]:
    """Returns the 64-bit keys of the bijection of each number in an epoch, ``round number``."""
    words = random_words(seed, np.array([epoch]), numbers, Purpose.ORDER, num_draws=_DRAWS, first_draw=first_draw)
    halves = words.reshape(len(numbers), _ROUNDS, 2).astype(np.uint64)
    return np.ascontiguousarray(((halves[..., 1] << np.uint64(32)) | halves[..., 0]).T)


class _WindowedEpoch:
    """An epoch in which shards are shuffled, and then the rows of each window of shards."""

    def __init__(self, seed: int, epoch: int, starts: NDArray[np.int64], sizes: NDArray[np.int64], window: int) -> None:
        """Lays the shards, given by their first rows and numbers of rows, at least one, in the epoch's order."""
        self._seed = seed
        self._epoch = epoch
        # Draws 0 to 3 of number 0 are the full order's; the shards have the next four, window w those of number w + 1.
        keys = _round_keys(seed, epoch, np.array([0]), first_draw=_DRAWS)
        shards = _permuted(np.arange(len(sizes)), np.array([len(sizes)]), keys)
        self._ends = np.cumsum(sizes[shards])
        self._shifts = starts[shards] + sizes[shards] - self._ends
        count = -(-len(sizes) // window)  # windows of equal numbers of shards, to one: none is left with a few
        last = np.arange(1, count + 1) * len(sizes) // count - 1
        self._window_ends = self._ends[last]
        self._window_sizes = np.diff(self._window_ends, prepend=0)
        self._keys = np.zeros((_ROUNDS, len(last)), np.uint64)
        self._has_keys = np.zeros(len(last), np.bool_)

    def rows(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the row at each place of the epoch."""
        windows = np.searchsorted(self._window_ends, places, side="right")
        new = np.unique(windows[~self._has_keys[windows]])
        if new.size:
            self._keys[:, new] = _round_keys(self._seed, self._epoch, new + 1)
            self._has_keys[new] = True
        sizes = self._window_sizes[windows]
        starts = self._window_ends[windows] - sizes
        shuffled: NDArray[np.int64] = starts + _permuted(places - starts, sizes, self._keys[:, windows])
        return shuffled + self._shifts[np.searchsorted(self._ends, shuffled, side="right")]


class Order:
    """The rows of a training run, in order, at any position."""

    def __init__(
        self, config: OrderConfig, *, num_rows: int, seed: int, shard_sizes: NDArray[np.int64] | None = None
    ) -> None:
        """Makes the order of ``num_rows`` rows under a seed.

        Args:
            config: how they are shuffled.
            num_rows: the rows [0, num_rows) are ordered: of the data set, or of a selection from it.
            seed: the run's.
            shard_sizes: how many of the rows lie in each shard, in the order of rows; needed by ``windowed``.

        Raises:
            ValueError: there are no rows, the seed is out of range, or shard sizes are missing or not of these rows.
        """
        if not 0 < num_rows < 1 << 62:
            raise ValueError(f"num_rows is {num_rows}; expected at least 1: is there a sample left to train on?")
        self.config = config
        self.num_rows = num_rows
        self.seed = check_seed(seed)
        self._epochs: dict[int, _RowsOf] = {}
        self._starts = self._sizes = np.zeros(0, np.int64)
        if shard_sizes is not None:
            sizes = np.asarray(shard_sizes, np.int64)
            if sizes.ndim != 1 or (sizes < 0).any() or sizes.sum() != num_rows:
                raise ValueError(
                    f"shard_sizes sum to {sizes.sum()}; expected {num_rows}, the number of rows, none below 0"
                )
            kept = sizes > 0
            self._starts, self._sizes = (np.cumsum(sizes) - sizes)[kept], sizes[kept]
        elif config.kind == "windowed":
            raise ValueError("data.order.kind is 'windowed', which needs to know the sizes of the shards: shard_sizes")

    @property
    def shards_open(self) -> int | None:
        """The most shards that are read at any position; None, for all of them, where all rows are shuffled.

        A batch that lies in two windows reads both windows' shards.
        """
        return min(self.config.window, len(self._sizes)) if self.config.kind == "windowed" else None

    def fingerprint(self) -> dict[str, str | int]:
        """Returns what must be the same, beside the seed and the rows, for a position to mean the same.

        The full order does not depend on ``window`` and the shards, so they are 0 and empty there.
        """
        is_windowed = self.config.kind == "windowed"
        return {
            "order": self.config.kind,
            "num_rows": self.num_rows,
            "window": self.shards_open or 0,
            "shard_sizes": xxhash.xxh3_64_hexdigest(self._sizes.astype("<i8").tobytes()) if is_windowed else "",
        }

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the row at each global position, int64, the same shape as ``positions``."""
        epochs, places = np.divmod(np.asarray(positions, np.int64), self.num_rows)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = self._opened(int(epoch))(places[chosen])
        return rows

    def _opened(self, epoch: int) -> _RowsOf:
        """Returns an epoch's function from places to rows, with its tables and keys; the last few epochs' are kept."""
        rows_of = self._epochs.get(epoch)
        if rows_of is None:
            if self.config.kind == "full":
                keys = _round_keys(self.seed, epoch, np.array([0]))
                rows_of = partial(_permuted, sizes=np.array([self.num_rows]), keys=keys)
            else:
                window = min(self.config.window, len(self._sizes))
                rows_of = _WindowedEpoch(self.seed, epoch, self._starts, self._sizes, window).rows
            if len(self._epochs) >= _EPOCHS_KEPT:
                self._epochs.clear()
            self._epochs[epoch] = rows_of
        return rows_of


def slice_of(rank: int, world: int, global_size: int) -> slice:
    """Returns this rank's part of a global batch: contiguous, of the same size on every rank, even at both ends.

    Even, because the samples at positions p and p XOR 1 are partners wherever a view needs another image.

    Raises:
        ValueError: the slices would differ in size, or cut a pair of partners.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}; expected 0 to {world - 1} in a world of {world}")
    step = 2 * world
    if global_size <= 0 or global_size % step:
        below, above = global_size // step * step, (max(global_size, 0) // step + 1) * step
        nearest = f"{below} or {above}" if below > 0 else f"{above}"
        raise ValueError(
            f"a global batch of {global_size} does not divide into equal, even slices for {world} "
            f"rank{'s' if world > 1 else ''}; the nearest that does: {nearest}"
        )
    size = global_size // world
    return slice(rank * size, (rank + 1) * size)
