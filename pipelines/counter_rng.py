"""Counter-based random numbers: every draw is a pure function of (seed, position, view, purpose, draw).

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), vectorised in numpy.  A
counter-based generator has no state to save, to split over ranks or to run forward, so any batch can be drawn alone.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10
MAX_DRAWS = 1 << 24
"""Draws (blocks of four words) per position, view and purpose; the counter has no more room."""


class Purpose(IntEnum):
    """What a draw is for.  The numbers are part of the sample order and never change."""

    ORDER = 0
    CROP = 1
    FLIP = 2
    TOKEN_MASK = 3
    COLOUR = 4
    BLUR = 5
    SOLARISE = 6
    CORRUPTION = 7


def philox4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Returns the Philox4x32-10 block of each counter, uint32 ``4 ...``.

    Args:
        counter: four words below 2³² each, uint64 ``4 ...``; not changed.
        key: two words below 2³².
    """
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (product1 >> _HALF) ^ c1
        c0 ^= np.uint64(key0)
        c2 = (product0 >> _HALF) ^ c3
        c2 ^= np.uint64(key1)
        product1 &= _LOW
        product0 &= _LOW
        c1, c3 = product1, product0
        key0, key1 = (key0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (key1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3)).astype(np.uint32)


def check_seed(seed: int) -> int:
    """Returns the seed.

    Raises:
        ValueError: it is not in [0, 2⁶⁴).
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}; expected a whole number from 0 to 2**64 - 1")
    return seed


def random_words(
    seed: int,
    positions: NDArray[np.int64],
    views: NDArray[np.int64] | int,
    purpose: Purpose,
    *,
    num_draws: int = 1,
    first_draw: int = 0,
) -> NDArray[np.uint32]:
    """Returns four uniform 32-bit words per draw, uint32 ``... draw 4``.

    Args:
        seed: the run's seed, the generator's 64-bit key.
        positions: global positions (or whatever else is counted); broadcast against ``views``.
        views: the view's number; with ``positions`` it makes the leading axes.
        purpose: keeps the draws of different decisions apart.
        num_draws: blocks of four words wanted.
        first_draw: number of the first of them.
    """
    assert first_draw + num_draws <= MAX_DRAWS
    where, which = np.broadcast_arrays(np.asarray(positions, np.uint64), np.asarray(views, np.uint64))
    counter = np.empty((4, *where.shape, num_draws), np.uint64)
    counter[0] = (where & _LOW)[..., None]
    counter[1] = (where >> _HALF)[..., None]
    counter[2] = which[..., None]
    counter[3] = np.uint64(int(purpose) * MAX_DRAWS + first_draw) + np.arange(num_draws, dtype=np.uint64)
    check_seed(seed)
    block = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return np.moveaxis(block, 0, -1)


def as_uniform(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Returns the words as float64 in the open interval (0, 1)."""
    return (words.astype(np.float64) + 0.5) * 2.0**-32


def as_integer_below(words: NDArray[np.uint32], bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns whole numbers in [0, bound), one a word; exact integer arithmetic, bounds up to 2³¹."""
    product = words.astype(np.uint64) * bounds.astype(np.uint64)
    return (product >> _HALF).astype(np.int64)
