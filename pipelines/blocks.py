"""Rectangles in a square of cells, tokens or pixels, as bits: united, cut and counted 64 cells at a time."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestri.pipelines.counter_rng import as_integer_below

MOST_BLOCKS = 256
"""Blocks that ``cover`` draws for a sample."""
_AT_ONCE = 16
_WORDS_AT_ONCE = 1 << 18


def pack_rectangles(
    top: NDArray[np.int64], left: NDArray[np.int64], height: NDArray[np.int64], width: NDArray[np.int64], *, side: int
) -> NDArray[np.uint64]:
    """Returns squares of ``side`` × ``side`` cells, one rectangle's set, a bit each, uint64 ``... word``."""
    row, start, below = _layout(side)
    in_rows = (row >= top[..., None]) & (row < (top + height)[..., None])
    bits = len(below) - 1
    right, left = (left + width)[..., None] - start, left[..., None] - start
    in_columns = below[np.minimum(np.maximum(right, 0), bits)] ^ below[np.minimum(np.maximum(left, 0), bits)]
    cells: NDArray[np.uint64] = np.where(in_rows[..., None, :], in_columns[..., None], below[0])
    return cells.reshape(*top.shape, len(start) * len(row)).view(np.uint64)


def unpack_cells(packed: NDArray[np.uint64], *, side: int) -> NDArray[np.bool_]:
    """Returns sets of cells as bool ``... height width``."""
    row, start, below = _layout(side)
    words = packed.view(below.dtype).reshape(*packed.shape[:-1], len(start), len(row))[..., :side]
    octets = np.ascontiguousarray(np.moveaxis(words, -2, -1)).view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=side, bitorder="little").view(np.bool_)


def count_cells(packed: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Returns how many cells each set has, int64 ``...``."""
    has_it = hasattr(np, "bitwise_count")  # numpy 2
    counts = np.bitwise_count(packed) if has_it else np.unpackbits(packed.view(np.uint8), axis=-1)
    return np.asarray(counts.sum(axis=-1, dtype=np.int64))


@cache
def _layout(side: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
    """Returns how squares are packed: the rows' numbers, the first column of each of a row's words, and n ↦ n low bits.

    A row is a word of 8, 16, 32 or 64 bits, or several of 64, little-endian: first all rows' first words, then all
    rows' second ones.  There are rows to fill whole 64 bits.
    """
    bits = next((bits for bits in (8, 16, 32) if side <= bits), 64)
    in_word = 64 // bits
    rows = -(-side // in_word) * in_word
    below = np.array([(1 << count) - 1 for count in range(bits + 1)], f"<u{bits // 8}")
    return np.arange(rows), np.arange(0, side, bits), below


def cover(
    words_of: Callable[[NDArray[np.int64], int, int], NDArray[np.uint32]],
    needed: NDArray[np.int64],
    starts: NDArray[np.int64],
    *,
    sides: tuple[int, int],
    side: int,
) -> NDArray[np.bool_]:
    """Returns which cells are covered, bool ``sample height width``: by blocks, until enough are.

    So there are less than a block more than needed.  What ``MOST_BLOCKS`` blocks leave is covered cell by cell in
    reading order, from a given cell on and then from the top, up to exactly what is needed.

    Args:
        words_of: gives of some samples the words of blocks ``first`` to ``first + count - 1``: ``sample block 4``,
            for height, width, top and left.
        needed: cells that are to be covered at least, ``sample``.
        starts: where covering cell by cell begins, ``sample``.
        sides: the shortest and the longest side of a block; heights and widths are uniform between them.
        side: cells along a side.
    """
    shortest, span = sides[0], np.array(sides[1] - sides[0] + 1)
    covered = pack_rectangles(*np.zeros((4, needed.size), np.int64), side=side)
    at_once = max(_WORDS_AT_ONCE // (_AT_ONCE * covered.shape[1]), 1)  # what the processor's cache holds
    left_over = np.arange(needed.size)
    for first in range(0, MOST_BLOCKS, _AT_ONCE):
        not_yet = []
        for which in np.split(left_over, range(at_once, left_over.size, at_once)):
            words = words_of(which, first, _AT_ONCE).transpose(2, 1, 0)
            height, width = (as_integer_below(word, span) + shortest for word in words[:2])
            top, left = as_integer_below(words[2], side + 1 - height), as_integer_below(words[3], side + 1 - width)
            blocks = pack_rectangles(top, left, height, width, side=side)
            blocks[0] |= covered[which]
            for number in range(1, _AT_ONCE):
                blocks[number] |= blocks[number - 1]
            reached = count_cells(blocks) >= needed[which]
            enough = reached.any(axis=0)
            covered[which] = blocks[np.where(enough, reached.argmax(axis=0), -1), np.arange(which.size)]
            not_yet.append(which[~enough])
        left_over = np.concatenate(not_yet)
        if left_over.size == 0:
            break
    cells = unpack_cells(covered, side=side)
    for sample in left_over:
        flat = cells[sample].reshape(-1)
        free = np.flatnonzero(~flat)
        free = np.roll(free, -np.searchsorted(free, starts[sample]))
        flat[free[: needed[sample] - (flat.size - free.size)]] = True
    return cells
