"""Colour jitter: how much each view's brightness, contrast, saturation and hue are changed, and which turn grey.

A colour is changed by one linear map, and not by torchvision's four steps in random order with rounding between them:
contrast pulls towards mid-grey (128) rather than the image's own mean grey, and hue turns in the YIQ plane.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maestri.pipelines.counter_rng import Purpose, as_uniform, random_words

_TO_YIQ = np.array(((0.299, 0.587, 0.114), (0.596, -0.274, -0.321), (0.211, -0.523, 0.311)))
"""RGB → luma and the two colour differences of NTSC."""
MID_GREY = 128.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ColourConfig:
    """How far colours may be changed; all zero changes nothing."""

    brightness: float = 0.0
    """Factors of brightness lie within 1 ± this."""
    contrast: float = 0.0
    """Factors of contrast, around mid-grey, lie within 1 ± this."""
    saturation: float = 0.0
    """Factors of saturation lie within 1 ± this."""
    hue: float = 0.0
    """Hue turns by up to this fraction of a full turn, to either side."""
    probability: float = 1.0
    """That a view's brightness, contrast, saturation and hue are changed at all."""
    grey: float = 0.0
    """Probability that a view, changed or not, loses its colours: a saturation of 0."""

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ValueError: a field is out of range.
        """
        limits = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5, "probability": 1.0, "grey": 1.0}
        for field, most in limits.items():
            if not 0 <= getattr(self, field) <= most:
                raise ValueError(f"views.colour.{field} is {getattr(self, field)}; expected 0 to {most:g}")

    @property
    def changes(self) -> bool:
        """Whether anything is ever changed."""
        jitters = self.probability > 0 and max(self.brightness, self.contrast, self.saturation, self.hue) > 0
        return jitters or self.grey > 0


def plan_colour(
    config: ColourConfig, *, seed: int, positions: NDArray[np.int64], views: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Returns factors of brightness, contrast and saturation, and degrees of hue, float32 ``view batch 4``.

    Each is uniform in its range.  Draw 0 of the generator holds the four, draw 1 whether they count, and whether the
    view turns grey.
    """
    uniform = as_uniform(random_words(seed, positions, views, Purpose.COLOUR, num_draws=2))
    spread = np.array((config.brightness, config.contrast, config.saturation, config.hue * 360.0))
    unchanged = np.array((1.0, 1.0, 1.0, 0.0))
    drawn = unchanged + (2.0 * uniform[..., 0, :] - 1.0) * spread
    counts = uniform[..., 1, 0] < config.probability
    factors = np.where(counts[..., None], drawn, unchanged)
    factors[..., 2] *= uniform[..., 1, 1] >= config.grey
    return factors.astype(np.float32)


def colour_map(factors: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the linear map of one view's factors: a matrix ``3 3`` and an offset ``3``, for RGB from 0 to 255."""
    brightness, contrast, saturation, hue = factors.astype(np.float64).tolist()
    angle = np.deg2rad(hue)
    turn = saturation * np.array(((np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))))
    in_yiq = np.eye(3)
    in_yiq[1:, 1:] = turn
    matrix = brightness * contrast * np.linalg.inv(_TO_YIQ) @ in_yiq @ _TO_YIQ
    return matrix, np.full(3, brightness * (1.0 - contrast) * MID_GREY)
