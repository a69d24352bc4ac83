"""Which tokens of a view are hidden from the student."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from maestri.pipelines.blocks import count_cells, pack_rectangles, unpack_cells
from maestri.pipelines.counter_rng import MAX_DRAWS, Purpose, as_integer_below, as_uniform, random_words
from maestri.pipelines.exact_math import exp, log

_ATTEMPTS = 16
_AT_ONCE = 4
_LAST_DRAW = MAX_DRAWS - 1
"""Behind all that masks can use; its words: a view's own ratio, whether it is unmasked, whether it is turned."""
_Numbers = NDArray[np.int64]
_Masks = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskConfig:
    """How tokens are chosen that the student doesn't see."""

    kind: Literal["random", "block"] = "random"
    """``random``: each token alike (MAE).  ``block``: rectangles of tokens (BEiT, iBOT)."""
    ratio: float = 0.75
    """Fraction of a view's tokens that are hidden, rounded to whole tokens; 0 hides none."""
    spread: float = 0.0
    """Each view's own ratio is uniform in ``ratio`` ± ``spread``; 0: all views hide the same number of tokens."""
    unmasked: float = 0.0
    """Probability that a view hides nothing; 0: all views hide the same number of tokens."""
    shared: bool = False
    """Whether all views of a sample hide the same tokens."""
    smallest_block: int = 16
    """Tokens in a ``block`` at least, where there is room."""
    aspect: float = 0.3
    """Smallest height / width of a ``block``, and smallest width / height."""

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ValueError: a field is out of range.
        """
        checks = (
            ("ratio", 0 <= self.ratio < 1, "0 ≤ ratio < 1"),
            ("spread", 0 <= self.spread <= self.ratio, "0 ≤ spread ≤ ratio, so that no view's ratio is below 0"),
            ("spread", self.ratio + self.spread < 1, "ratio + spread < 1"),
            ("unmasked", 0 <= self.unmasked <= 1, "a probability, 0 to 1"),
            ("smallest_block", self.smallest_block >= 1, "at least 1 token"),
            ("aspect", 0 < self.aspect <= 1, "0 < aspect ≤ 1"),
        )
        for name, passed, expected in checks:
            if not passed:
                raise ValueError(f"views.mask.{name} is {getattr(self, name)}; expected {expected}")

    @property
    def constant_count(self) -> bool:
        """Whether all views hide the same number of tokens, so that their numbers fit one array."""
        return self.spread == 0 and self.unmasked == 0


def num_hidden(mask_ratio: float, num_tokens: int) -> int:
    """Returns how many of a view's tokens are hidden: the ratio, rounded; one token at least stays visible."""
    return min(round(mask_ratio * num_tokens), num_tokens - 1)


def plan_masks(config: MaskConfig, *, seed: int, positions: _Numbers, views: _Numbers, grid: int) -> _Masks:
    """Returns masks of ``grid`` × ``grid`` tokens, bool ``view batch token``, True = hidden.

    Each hides the same number of tokens, unless the ratio has a spread or some views stay unmasked.

    Args:
        config: how tokens are chosen.
        seed: the run's seed.
        positions: global positions, ``batch``.
        views: numbers of the views, ``view 1``.
        grid: tokens along a side.
    """
    drawn = views[:1] if config.shared else views
    count: int | _Numbers = num_hidden(config.ratio, grid * grid)
    if not config.constant_count:
        count = _drawn_counts(config, seed, positions, drawn, num_tokens=grid * grid)
    if config.kind == "block":
        masks = block_masks(config, seed, positions, drawn, grid=grid, count=count)
    else:
        masks = random_masks(seed, positions, drawn, num_tokens=grid * grid, count=count)
    return np.broadcast_to(masks, (len(views), *masks.shape[1:]))


def _drawn_counts(config: MaskConfig, seed: int, positions: _Numbers, views: _Numbers, *, num_tokens: int) -> _Numbers:
    """Returns how many tokens each view hides, int64 ``view batch``."""
    uniform = as_uniform(random_words(seed, positions, views, Purpose.TOKEN_MASK, first_draw=_LAST_DRAW)[..., 0, :2])
    ratio = config.ratio + config.spread * (2 * uniform[..., 0] - 1)
    counts = np.rint(ratio * num_tokens).astype(np.int64).clip(0, num_tokens - 1)
    return np.where(uniform[..., 1] < config.unmasked, 0, counts)


def random_masks(seed: int, positions: _Numbers, views: _Numbers, *, num_tokens: int, count: int | _Numbers) -> _Masks:
    """Returns uniformly random masks of exactly ``count`` tokens, bool ``... token``, True = hidden.

    Each token gets a random key, and those with the ``count`` smallest are hidden.  The token's own number takes the
    key's lowest bits, so no two keys are equal and the result depends on no sorting algorithm.
    """
    shape = np.broadcast_shapes(positions.shape, views.shape)
    counts = np.broadcast_to(count, shape)[..., None]
    if not counts.any():
        return np.zeros((*shape, num_tokens), np.bool_)
    words = random_words(seed, positions, views, Purpose.TOKEN_MASK, num_draws=-(-num_tokens // 4))
    keys = words.reshape(*shape, -1)[..., :num_tokens]
    low_bits = np.uint32((1 << (num_tokens - 1).bit_length()) - 1)
    keys = (keys & ~low_bits) | np.arange(num_tokens, dtype=np.uint32)
    threshold = np.take_along_axis(np.sort(keys, axis=-1), np.maximum(counts - 1, 0), axis=-1)
    masks: _Masks = keys <= threshold
    return masks if counts.all() else masks & (counts > 0)


def block_masks(
    config: MaskConfig, seed: int, positions: _Numbers, views: _Numbers, *, grid: int, count: int | _Numbers
) -> _Masks:
    """Returns masks of rectangles, exactly ``count`` tokens each, bool ``... token``, True = hidden.

    Blocks as in BEiT (arXiv 2106.08254, algorithm 1) and iBOT: area uniform from ``smallest_block`` to what is still to
    be hidden, height / width log-uniform in (``aspect``, 1 / ``aspect``), place uniform; one longer than the grid is
    left out.  Theirs also leave out a block that would hide too much, and end a little short; here it is cut: of the
    tokens that it would add the first in reading order are hidden, so its bottom rows are missing.  What 16 attempts
    don't hide grows from the hidden tokens' neighbours, ring by ring, in reading order.  Half of the masks are then
    turned by 180°, so that top and bottom are hidden alike.

    Attempt k uses draw k of the generator, its four words in the order area, aspect, top, left.
    """
    shape = np.broadcast_shapes(positions.shape, views.shape)
    positions, views, missing = (np.broadcast_to(values, shape).ravel() for values in (positions, views, count))
    missing = missing.astype(np.int64)
    hidden = pack_rectangles(*np.zeros((4, missing.size), np.int64), side=grid)
    last_block, lowest = hidden.copy(), np.minimum(config.smallest_block, missing)
    left_over = np.flatnonzero(missing)
    for first in range(0, _ATTEMPTS, _AT_ONCE):
        if left_over.size == 0:
            break
        which = positions[left_over], views[left_over]
        words = random_words(seed, *which, Purpose.TOKEN_MASK, num_draws=_AT_ONCE, first_draw=first)
        uniform = as_uniform(words[..., :2])
        roots = exp((0.5 - uniform[..., 1]) * log(config.aspect))
        low, so_far, still = lowest[left_over], hidden[left_over], missing[left_over]
        going = still > 0
        for attempt in range(_AT_ONCE):
            side = np.sqrt(low + uniform[:, attempt, 0] * np.maximum(still - low, 0))
            block = _placed(side * roots[:, attempt], side / roots[:, attempt], words[:, attempt], grid) & ~so_far
            added = count_cells(block) * going
            ends = going & (added >= still)
            last_block[left_over[ends]] = block[ends]
            going &= ~ends
            block[~going] = 0
            so_far |= block
            still -= added * going
        hidden[left_over], missing[left_over] = so_far, still
        left_over = left_over[going]
    masks = unpack_cells(hidden, side=grid)
    masks |= _first_cells(unpack_cells(last_block, side=grid), missing)
    _grow(masks, left_over, missing)
    flat = masks.reshape(-1, grid * grid)
    turned = random_words(seed, positions, views, Purpose.TOKEN_MASK, first_draw=_LAST_DRAW)[:, 0, 2] % 2 == 1
    flat[turned] = flat[turned, ::-1]
    return flat.reshape(*shape, grid * grid)


def _placed(
    height: NDArray[np.float64], width: NDArray[np.float64], words: NDArray[np.uint32], grid: int
) -> NDArray[np.uint64]:
    """Returns packed rectangles of whole tokens, their top and left drawn from words 2 and 3; empty where none fits."""
    rows, columns = (np.maximum(np.rint(side), 1).astype(np.int64) for side in (height, width))
    fits = (rows <= grid) & (columns <= grid)
    rows, columns = rows * fits, columns * fits
    top, left = as_integer_below(words[:, 2], grid - rows + 1), as_integer_below(words[:, 3], grid - columns + 1)
    return pack_rectangles(top, left, rows, columns, side=grid)


def _first_cells(cells: _Masks, counts: _Numbers) -> _Masks:
    """Returns of each set the ``counts`` first cells in reading order, bool ``set height width``."""
    flat = cells.reshape(len(cells), cells.shape[1] * cells.shape[2])
    numbers = np.cumsum(flat, axis=-1, dtype=np.int32).reshape(cells.shape)
    return cells & (numbers <= counts[:, None, None])


def _grow(masks: _Masks, which: _Numbers, missing: _Numbers) -> None:
    """Hides what is ``missing`` from some masks, ``mask height width``: neighbours of hidden tokens, ring by ring."""
    while which.size:
        grown = masks[which]
        near = np.pad(grown, ((0, 0), (1, 1), (1, 1)))
        ring = near[:, :-2, 1:-1] | near[:, 2:, 1:-1] | near[:, 1:-1, :-2] | near[:, 1:-1, 2:]
        middle = masks.shape[-1] // 2
        ring[:, middle, middle] |= ~grown.any(axis=(1, 2))
        added = _first_cells(ring & ~grown, missing[which])
        masks[which] = grown | added
        missing[which] -= added.sum(axis=(1, 2))
        which = which[missing[which] > 0]


def split_indices(masks: _Masks) -> tuple[_Numbers, _Numbers]:
    """Returns the visible and the hidden tokens' numbers, int64 ``... visible`` and ``... masked``, ascending.

    Every mask must hide the same number of tokens.
    """
    *shape, num_tokens = masks.shape
    samples = int(np.prod(shape))
    flat = np.flatnonzero(~masks), np.flatnonzero(masks)
    visible, hidden = (numbers.reshape(*shape, numbers.size // max(samples, 1)) for numbers in flat)
    starts = np.arange(samples).reshape(*shape, 1) * num_tokens
    visible -= starts  # in place: six times as fast as the remainder, which needs fresh memory
    hidden -= starts
    return visible, hidden
