"""Which row stands at which global position: a pure function of the seed.

Epoch e is the range of positions [e·N, (e+1)·N); in it every one of the N rows comes exactly once.  The permutation is
computed, not stored: position p of epoch e is mapped by a keyed bijection of [0, N), so that reading any position costs
the same and needs no memory, at a thousand rows or at a hundred million.

The bijection: write p as (left, right) in the base of two numbers a·b ≥ N, a = ⌈√N⌉, b = ⌈N/a⌉; in eight alternating
rounds add to one half a keyed hash of the other, modulo the half's size (Black and Rogaway, "Ciphers with arbitrary
finite domains", CT-RSA 2002); where the result lies outside [0, N), apply it again ("cycle walking"), which a·b being
so close to N makes rare.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from maestri.pipelines.counter_rng import Purpose, check_seed, random_words

_ROUNDS = 8
_MIX = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
"""The multipliers of MurmurHash3's 64-bit finaliser."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderConfig:
    """How samples are shuffled."""

    kind: Literal["full"] = "full"
    """``full``: a uniform shuffle of all rows, new in each epoch."""


def _hash(half: NDArray[np.uint64], key: np.uint64, size: int) -> NDArray[np.uint64]:
    """Returns a keyed hash in [0, size) of each half."""
    mixed = half ^ key
    for multiplier in _MIX:
        mixed ^= mixed >> np.uint64(33)
        mixed *= multiplier
    mixed ^= mixed >> np.uint64(33)
    return ((mixed >> np.uint64(32)) * np.uint64(size)) >> np.uint64(32)


class Order:
    """The rows of a training run, in order, at any position."""

    def __init__(self, config: OrderConfig, *, num_rows: int, seed: int) -> None:
        """Makes the order of ``num_rows`` rows under a seed.

        Raises:
            ValueError: there are no rows, or the seed is out of range.
        """
        if not 0 < num_rows < 1 << 62:
            raise ValueError(f"num_rows is {num_rows}; expected at least 1: is there a sample left to train on?")
        self.config = config
        self.num_rows = num_rows
        self.seed = check_seed(seed)
        self._size_left = math.isqrt(num_rows - 1) + 1
        self._size_right = -(-num_rows // self._size_left)
        self._keys: dict[int, NDArray[np.uint64]] = {}

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the row at each global position, int64, the same shape as ``positions``."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.num_rows)
        rows = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = self._permute(offsets[chosen].astype(np.uint64), self._round_keys(int(epoch)))
        return rows

    def _round_keys(self, epoch: int) -> NDArray[np.uint64]:
        """Returns one 64-bit key per round; the last few epochs' are kept."""
        if epoch not in self._keys:
            if len(self._keys) >= 8:
                self._keys.clear()
            words = random_words(self.seed, np.array([epoch]), 0, Purpose.ORDER, num_draws=_ROUNDS // 2)
            halves = words.reshape(_ROUNDS, 2).astype(np.uint64)
            self._keys[epoch] = (halves[:, 1] << np.uint64(32)) | halves[:, 0]
        return self._keys[epoch]

    def _permute(self, offsets: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Returns the image of each offset under the epoch's bijection of [0, num_rows)."""
        result = self._permute_domain(offsets, keys)
        outside = np.flatnonzero(result >= self.num_rows)
        while outside.size:
            result[outside] = self._permute_domain(result[outside], keys)
            outside = outside[result[outside] >= self.num_rows]
        return result.astype(np.int64)

    def _permute_domain(self, offsets: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Returns the image of each number under the bijection of [0, a·b)."""
        size_left, size_right = np.uint64(self._size_left), np.uint64(self._size_right)
        left, right = np.divmod(offsets, size_right)
        for number, key in enumerate(keys):
            if number % 2 == 0:
                left += _hash(right, key, self._size_left)
                left -= size_left * (left >= size_left)
            else:
                right += _hash(left, key, self._size_right)
                right -= size_right * (right >= size_right)
        return left * size_right + right


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
