"""Crop windows: torchvision's RandomResizedCrop, drawn from the counter and computed the same on every machine."""

import numpy as np
from numpy.typing import NDArray

from maestri.pipelines.counter_rng import Purpose, as_integer_below, as_uniform, random_words
from maestri.pipelines.exact_math import exp, log

_ATTEMPTS = 10


def random_resized_crops(
    scale: tuple[float, float],
    ratio: tuple[float, float],
    *,
    seed: int,
    positions: NDArray[np.int64],
    views: NDArray[np.int64],
    widths: NDArray[np.int64],
    heights: NDArray[np.int64],
) -> NDArray[np.int32]:
    """Returns crop windows as torchvision's RandomResizedCrop draws them, int32 ``view batch 4``.

    Ten attempts at an area uniform in ``scale`` and a ratio log-uniform in ``ratio``; the first that fits is placed
    uniformly.  If none fits: the largest centred window within ``ratio``.  Attempt k uses draw k of the generator, its
    four words in the order area, ratio, top, left.
    """
    shape = np.broadcast_shapes(positions.shape, views.shape)
    positions, views, widths, heights = (
        np.broadcast_to(values, shape).ravel() for values in (positions, views, widths, heights)
    )
    windows = _central_windows(ratio, widths, heights)
    left_over = np.arange(positions.size)
    # Nearly every sample fits at once, so the other nine attempts are drawn only for those that don't.
    for first, count in ((0, 1), (1, _ATTEMPTS - 1)):
        words = random_words(
            seed, positions[left_over], views[left_over], Purpose.CROP, num_draws=count, first_draw=first
        )
        width, height = widths[left_over, None], heights[left_over, None]
        crop_height, crop_width = _attempted_sizes(scale, ratio, words, width, height)
        fits = (crop_height > 0) & (crop_height <= height) & (crop_width > 0) & (crop_width <= width)
        attempt = fits.argmax(axis=1)[:, None]
        crop_height, crop_width = (np.take_along_axis(values, attempt, axis=1) for values in (crop_height, crop_width))
        placed = np.take_along_axis(words, attempt[..., None], axis=1)[:, 0]
        fitted = fits.any(axis=1)
        top = as_integer_below(placed[:, 2], np.maximum(height - crop_height + 1, 1)[:, 0])
        left = as_integer_below(placed[:, 3], np.maximum(width - crop_width + 1, 1)[:, 0])
        found = np.stack((top, left, crop_height[:, 0], crop_width[:, 0]), axis=-1)
        windows[left_over[fitted]] = found[fitted]
        left_over = left_over[~fitted]
        if left_over.size == 0:
            break
    return windows.reshape(*shape, 4).astype(np.int32)


def _attempted_sizes(
    scale: tuple[float, float],
    ratio: tuple[float, float],
    words: NDArray[np.uint32],
    widths: NDArray[np.int64],
    heights: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the crop height and width of each attempt, int64 ``sample attempt``; not all fit."""
    uniform = as_uniform(words[..., :2])
    smallest, largest = scale
    side = np.sqrt((smallest + uniform[..., 0] * (largest - smallest)) * (widths * heights))
    low, high = log(ratio[0]), log(ratio[1])
    root_of_ratio = exp(0.5 * (low + uniform[..., 1] * (high - low)))
    return np.rint(side / root_of_ratio).astype(np.int64), np.rint(side * root_of_ratio).astype(np.int64)


def _central_windows(
    ratio: tuple[float, float], widths: NDArray[np.int64], heights: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Returns the largest centred window within ``ratio``, int64 ``sample 4``."""
    shape = widths / heights
    crop_width = np.where(shape > ratio[1], np.rint(heights * ratio[1]), widths).astype(np.int64).clip(1, widths)
    crop_height = np.where(shape < ratio[0], np.rint(widths / ratio[0]), heights).astype(np.int64).clip(1, heights)
    return np.stack(((heights - crop_height) // 2, (widths - crop_width) // 2, crop_height, crop_width), axis=-1)
