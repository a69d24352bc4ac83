"""What is done to a sample: a pure function of (seed, global position, view), planned for a whole batch at once.

Executors only carry a plan out; they draw nothing.  So a plan is bit-equal on any number of ranks, any device and any
executor.  Only operations that IEEE 754 rounds correctly (+ − × ÷ √) are used, never a library's ``exp`` or ``log``,
whose last bit differs between machines.

A view is made in this order: cut the window, resize, flip, colours, blur, solarise, corruption (into a second view).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from maestri.pipelines.colour import ColourConfig, plan_colour
from maestri.pipelines.corruption import CorruptionConfig, CorruptionPlan, plan_corruption
from maestri.pipelines.counter_rng import Purpose, as_uniform, random_words
from maestri.pipelines.crops import random_resized_crops
from maestri.pipelines.filters import BlurConfig, by_view, check_probabilities, plan_blur, plan_solarise
from maestri.pipelines.masks import MaskConfig, plan_masks

GLOBAL, LOCAL = "global", "local"
CORRUPTED = "_corrupted"
"""Behind a group's name: the name of its corrupted twin."""
_FIRST_VIEW = {GLOBAL: 0, LOCAL: 1 << 16}
"""The generator's number of each group's first view: part of the sample order, never changed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalConfig:
    """Small views beside the global ones (multi-crop, arXiv 2006.09882): clean, nothing hidden.

    Ratio, flip, colours and the resize's filter are those of the global views.
    """

    count: int = 0
    """Local views of each sample."""
    size: int = 96
    """Height and width of a local view, in pixels; must be divisible by the encoder's patch."""
    scale: tuple[float, float] = (0.05, 0.25)
    """Smallest and largest area of a crop, as a fraction of the image's."""
    blur: tuple[float, ...] = (0.0,)
    """Probability that a local view is blurred: one number for all, or one for each; ``views.blur`` has the sigmas."""
    solarise: tuple[float, ...] = (0.0,)
    """Probability that a local view is solarised: one number for all, or one for each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewsConfig:
    """What the views of a sample are; all but ``local`` is about the global ones."""

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
    blur: BlurConfig = field(default_factory=BlurConfig)
    """Gaussian blur."""
    solarise: tuple[float, ...] = (0.0,)
    """Probability that levels from 128 on are inverted: one number for all views, or one for each."""
    interpolation: Literal["linear", "cubic"] = "cubic"
    """Filter of the resize."""
    antialias: bool = True
    """Whether the filter widens when shrinking, as Pillow's and torchvision's do."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """Which tokens are hidden from the student."""
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)
    """Corrupted twins of the views; ``mask`` isn't used beside it: what is corrupted is what the token mask says."""
    local: LocalConfig = field(default_factory=LocalConfig)
    """Small views beside the others."""

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ValueError: a field is out of range.
        """
        checks = (
            ("size", self.size, self.size >= 1, "at least 1 pixel"),
            ("count", self.count, self.count >= 1, "at least 1 view"),
            ("scale", self.scale, _is_scale(self.scale), "0 < smallest ≤ largest ≤ 1, fractions of the area"),
            ("ratio", self.ratio, 0 < self.ratio[0] <= self.ratio[1], "0 < smallest ≤ largest, width / height"),
            ("flip", self.flip, 0 <= self.flip <= 1, "a probability, 0 to 1"),
            ("local.count", self.local.count, self.local.count >= 0, "at least 0 views"),
            ("local.size", self.local.size, self.local.size >= 1, "at least 1 pixel"),
            ("local.scale", self.local.scale, _is_scale(self.local.scale), "0 < smallest ≤ largest ≤ 1"),
        )
        for name, value, passed, expected in checks:
            if not passed:
                raise ValueError(f"views.{name} is {value}; expected {expected}")
        for name, probabilities, count in (
            ("blur.probability", self.blur.probability, self.count),
            ("solarise", self.solarise, self.count),
            ("local.blur", self.local.blur, self.local.count),
            ("local.solarise", self.local.solarise, self.local.count),
        ):
            check_probabilities(f"views.{name}", probabilities)
            by_view(f"views.{name}", probabilities, count)

    def group_names(self) -> tuple[str, ...]:
        """Returns the names of the groups of views that are planned, in their order."""
        return (GLOBAL, LOCAL) if self.local.count else (GLOBAL,)


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
    blur: NDArray[np.float32] | None = None
    """``view batch``: standard deviation in pixels, 0 = not blurred; None where none is."""
    solarise: NDArray[np.bool_] | None = None
    """``view batch``: solarised; None where none is."""
    token_mask: NDArray[np.bool_]
    """``view batch token``: True = hidden from the student, or corrupted."""
    corruption: CorruptionPlan | None = None
    """What the corrupted twin of each view shows; None where there is none."""


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
    """Returns the plan of a batch: crop windows, flips, colours, blur, solarisation, masks and corruption.

    Args:
        config: what the views are.
        seed: the run's seed.
        positions: global positions, ``batch``.
        widths: of the stored images in pixels, ``batch``.
        heights: of the stored images in pixels, ``batch``.
        patch: side of a token in pixels.
    """
    groups = {}
    for name in config.group_names():
        is_local = name == LOCAL
        count, size, scale = (
            (config.local.count, config.local.size, config.local.scale)
            if is_local
            else (config.count, config.size, config.scale)
        )
        numbers = (_FIRST_VIEW[name] + np.arange(count, dtype=np.int64))[:, None]
        windows = random_resized_crops(
            scale, config.ratio, seed=seed, positions=positions, views=numbers, widths=widths, heights=heights
        )
        flip = as_uniform(random_words(seed, positions, numbers, Purpose.FLIP)[..., 0, 0]) < config.flip
        colour = blur = solarise = corruption = None
        if config.colour.changes:
            colour = plan_colour(config.colour, seed=seed, positions=positions, views=numbers)
        blurred, solarised = probabilities_of(config, name)
        if blurred.any():
            blur = plan_blur(blurred, config.blur.sigma, seed=seed, positions=positions, views=numbers)
        if solarised.any():
            solarise = plan_solarise(solarised, seed=seed, positions=positions, views=numbers)
        grid = size // patch
        if is_local:
            token_mask = np.zeros((count, len(positions), grid * grid), np.bool_)
        elif config.corruption.corrupts:
            token_mask, corruption = plan_corruption(
                config.corruption, seed=seed, positions=positions, views=numbers, grid=grid, patch=patch
            )
        else:
            token_mask = plan_masks(config.mask, seed=seed, positions=positions, views=numbers, grid=grid)
        groups[name] = GroupPlan(
            size=size,
            windows=windows,
            flip=flip,
            colour=colour,
            blur=blur,
            solarise=solarise,
            token_mask=token_mask,
            corruption=corruption,
        )
    return ViewPlan(groups=groups)


def probabilities_of(config: ViewsConfig, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns for each view of a group how probably it is blurred and solarised, ``view 1``."""
    if name == LOCAL:
        local = config.local
        return (
            by_view("views.local.blur", local.blur, local.count),
            by_view("views.local.solarise", local.solarise, local.count),
        )
    return (
        by_view("views.blur.probability", config.blur.probability, config.count),
        by_view("views.solarise", config.solarise, config.count),
    )


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


def _is_scale(scale: tuple[float, float]) -> bool:
    return 0 < scale[0] <= scale[1] <= 1
