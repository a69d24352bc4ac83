"""Which tokens of a view are hidden from the student."""

import numpy as np
from numpy.typing import NDArray

from maestri.pipelines.counter_rng import Purpose, random_words


def num_hidden(mask_ratio: float, num_tokens: int) -> int:
    """Returns how many of a view's tokens are hidden: the ratio, rounded; one token at least stays visible."""
    return min(round(mask_ratio * num_tokens), num_tokens - 1)


def random_masks(
    seed: int, positions: NDArray[np.int64], views: NDArray[np.int64], *, num_tokens: int, count: int
) -> NDArray[np.bool_]:
    """Returns uniformly random masks of exactly ``count`` tokens, bool ``... token``, True = hidden.

    Each token gets a random key, and those with the ``count`` smallest are hidden.  The token's own number takes the
    key's lowest bits, so no two keys are equal and the result depends on no sorting algorithm.
    """
    shape = np.broadcast_shapes(positions.shape, views.shape)
    if count == 0:
        return np.zeros((*shape, num_tokens), np.bool_)
    words = random_words(seed, positions, views, Purpose.TOKEN_MASK, num_draws=-(-num_tokens // 4))
    keys = words.reshape(*shape, -1)[..., :num_tokens]
    low_bits = np.uint32((1 << (num_tokens - 1).bit_length()) - 1)
    keys = (keys & ~low_bits) | np.arange(num_tokens, dtype=np.uint32)
    threshold: NDArray[np.uint32] = np.sort(keys, axis=-1)[..., count - 1 : count]
    return keys <= threshold


def split_indices(masks: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the visible and the hidden tokens' numbers, int64 ``... visible`` and ``... masked``, ascending.

    Every mask must hide the same number of tokens.
    """
    *shape, num_tokens = masks.shape
    visible = np.flatnonzero(~masks) % num_tokens
    hidden = np.flatnonzero(masks) % num_tokens
    samples = max(int(np.prod(shape)), 1)
    return visible.reshape(*shape, visible.size // samples), hidden.reshape(*shape, hidden.size // samples)
