"""What is done to a sample: a pure function of (seed, global position, view), planned for a whole batch at once.

Executors only carry a plan out; they draw nothing.  So a plan is bit-equal on any number of ranks, any device and any
executor.  Only operations that IEEE 754 rounds correctly (+ − × ÷ √) are used, never a library's ``exp`` or ``log``,
whose last bit differs between machines.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from maestri.pipelines.colour import ColourConfig, plan_colour
from maestri.pipelines.counter_rng import Purpose, as_integer_below, as_uniform, random_words
from maestri.pipelines.masks import num_hidden, random_masks

GLOBAL = "global"
_FIRST_VIEW = {GLOBAL: 0}
"""The generator's number of each group's first view: part of the sample order, never changed."""
_ATTEMPTS = 10
_LN2 = 0.6931471805599453


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewsConfig:
    """What the views of a sample are."""

    size: int = 224
    """Height and width of a view, in pixels; must be divisible by the encoder's patch."""
    count: int = 2
    """Views of each sample."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of a crop, as a fraction of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    colour: ColourConfig = field(default_factory=ColourConfig)
    """Colour jitter."""
    interpolation: Literal["linear", "cubic"] = "cubic"
    """Filter of the resize."""
    antialias: bool = True
    """Whether the filter widens when shrinking, as Pillow's and torchvision's do."""
    mask_ratio: float = 0.75
    """Fraction of a view's tokens hidden from the student, rounded to whole tokens; 0 hides none."""

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ValueError: a field is out of range.
        """
        checks = (
            ("size", self.size >= 1, "at least 1 pixel"),
            ("count", self.count >= 1, "at least 1 view"),
            ("scale", 0 < self.scale[0] <= self.scale[1] <= 1, "0 < smallest ≤ largest ≤ 1, fractions of the area"),
            ("ratio", 0 < self.ratio[0] <= self.ratio[1], "0 < smallest ≤ largest, width / height"),
            ("flip", 0 <= self.flip <= 1, "a probability, 0 to 1"),
            ("mask_ratio", 0 <= self.mask_ratio < 1, "0 ≤ ratio < 1"),
        )
        for name, passed, expected in checks:
            if not passed:
                raise ValueError(f"views.{name} is {getattr(self, name)}; expected {expected}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPlan:
    """The views of one group, all of one size."""

    size: int
    """Height and width of the views, in pixels."""
    windows: NDArray[np.int32] | NDArray[np.float32]
    """``view batch 4``: top, left, height, width of the source window in pixels of the stored image.  int32: the window
    is cut out, then resized.  float32: the image is resized and the window cut from that, so pixels just outside of
    the window take part at its edges (evaluation)."""
    flip: NDArray[np.bool_]
    """``view batch``: mirrored left to right."""
    colour: NDArray[np.float32] | None = None
    """``view batch 4``: factors of brightness, contrast and saturation, and degrees of hue; None where none change."""
    token_mask: NDArray[np.bool_]
    """``view batch token``: True = hidden from the student."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewPlan:
    """What is done to each sample of a batch."""

    groups: Mapping[str, GroupPlan]
    """By the name of the group."""


def plan_views(
    config: ViewsConfig,
    *,
    seed: int,
    positions: NDArray[np.int64],
    widths: NDArray[np.int64],
    heights: NDArray[np.int64],
    patch: int,
) -> ViewPlan:
    """Returns the plan of a batch: crop windows, flips, colours and token masks.

    Args:
        config: what the views are.
        seed: the run's seed.
        positions: global positions, ``batch``.
        widths: of the stored images in pixels, ``batch``.
        heights: of the stored images in pixels, ``batch``.
        patch: side of a token in pixels.
    """
    numbers = (_FIRST_VIEW[GLOBAL] + np.arange(config.count, dtype=np.int64))[:, None]
    windows = random_resized_crops(
        config, seed=seed, positions=positions, views=numbers, widths=widths, heights=heights
    )
    flip = as_uniform(random_words(seed, positions, numbers, Purpose.FLIP)[..., 0, 0]) < config.flip
    num_tokens = (config.size // patch) ** 2
    count = num_hidden(config.mask_ratio, num_tokens)
    token_mask = random_masks(seed, positions, numbers, num_tokens=num_tokens, count=count)
    colour = None
    if config.colour.changes:
        colour = plan_colour(config.colour, seed=seed, positions=positions, views=numbers)
    group = GroupPlan(size=config.size, windows=windows, flip=flip, colour=colour, token_mask=token_mask)
    return ViewPlan(groups={GLOBAL: group})


def random_resized_crops(
    config: ViewsConfig,
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
    windows = _central_windows(config.ratio, widths, heights)
    left_over = np.arange(positions.size)
    # Nearly every sample fits at once, so the other nine attempts are drawn only for those that don't.
    for first, count in ((0, 1), (1, _ATTEMPTS - 1)):
        words = random_words(
            seed, positions[left_over], views[left_over], Purpose.CROP, num_draws=count, first_draw=first
        )
        width, height = widths[left_over, None], heights[left_over, None]
        crop_height, crop_width = _attempted_sizes(config, words, width, height)
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


def plan_center(size: int, *, crop_fraction: float, widths: NDArray[np.int64], heights: NDArray[np.int64]) -> ViewPlan:
    """Returns evaluation's plan: one view, the centred square of ``crop_fraction`` of the shorter side.

    It is "resize the shorter side to size / crop_fraction, then cut the centre" as one window (float32).
    """
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"crop_fraction is {crop_fraction}; expected above 0 and at most 1, of the shorter side")
    side = np.minimum(widths, heights) * crop_fraction
    windows = np.stack(((heights - side) / 2, (widths - side) / 2, side, side), axis=-1).astype(np.float32)[None]
    group = GroupPlan(
        size=size,
        windows=windows,
        flip=np.zeros(windows.shape[:2], np.bool_),
        token_mask=np.zeros((*windows.shape[:2], 0), np.bool_),
    )
    return ViewPlan(groups={GLOBAL: group})


def _attempted_sizes(
    config: ViewsConfig, words: NDArray[np.uint32], widths: NDArray[np.int64], heights: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the crop height and width of each attempt, int64 ``sample attempt``; not all fit."""
    uniform = as_uniform(words[..., :2])
    smallest, largest = config.scale
    side = np.sqrt((smallest + uniform[..., 0] * (largest - smallest)) * (widths * heights))
    low, high = _log(config.ratio[0]), _log(config.ratio[1])
    root_of_ratio = _exp(0.5 * (low + uniform[..., 1] * (high - low)))
    return np.rint(side / root_of_ratio).astype(np.int64), np.rint(side * root_of_ratio).astype(np.int64)


def _central_windows(
    ratio: tuple[float, float], widths: NDArray[np.int64], heights: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Returns the largest centred window within ``ratio``, int64 ``sample 4``."""
    shape = widths / heights
    crop_width = np.where(shape > ratio[1], np.rint(heights * ratio[1]), widths).astype(np.int64).clip(1, widths)
    crop_height = np.where(shape < ratio[0], np.rint(widths / ratio[0]), heights).astype(np.int64).clip(1, heights)
    return np.stack(((heights - crop_height) // 2, (widths - crop_width) // 2, crop_height, crop_width), axis=-1)


def _exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns exp(x) for moderate x, the same bits on every machine (relative error below 1e-15)."""
    exponent = np.rint(x / _LN2)
    rest = x - exponent * _LN2
    result = np.ones_like(rest)
    for divisor in range(14, 0, -1):
        result = 1.0 + rest * result / divisor
    return np.ldexp(result, exponent.astype(np.int32))


def _log(x: float) -> float:
    """Returns ln(x) for x > 0, the same bits on every machine (absolute error below 1e-14)."""
    mantissa, exponent = math.frexp(x)
    quotient = (mantissa - 1) / (mantissa + 1)
    square, series = quotient * quotient, 0.0
    for divisor in range(49, 0, -2):
        series = series * square + 1 / divisor
    return 2 * quotient * series + exponent * _LN2
