"""Blur and solarisation: which views they befall, and how strongly.

They come after flip and colours, in this order: blur, then solarise, as in BYOL (arXiv 2006.07733) and DINO
(arXiv 2104.14294).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maestri.pipelines.counter_rng import Purpose, as_uniform, random_words

SOLARISE_FROM = 128
"""Levels from this on are inverted: x → 255 − x."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlurConfig:
    """Gaussian blur."""

    probability: tuple[float, ...] = (0.0,)
    """That a view is blurred: one number for all views, or one for each."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation, in pixels of the view."""

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ValueError: a field is out of range.
        """
        check_probabilities("views.blur.probability", self.probability)
        smallest, largest = self.sigma
        if not 0 < smallest <= largest <= 64:
            raise ValueError(f"views.blur.sigma is {self.sigma}; expected 0 < smallest ≤ largest ≤ 64 pixels")


def check_probabilities(name: str, values: tuple[float, ...]) -> None:
    """Checks that these are probabilities.

    Raises:
        ValueError: there are none, or one isn't.
    """
    if not values or not all(0 <= value <= 1 for value in values):
        raise ValueError(f"{name} is {values}; expected probabilities, 0 to 1: one for all views, or one for each")


def by_view(name: str, values: tuple[float, ...], count: int) -> NDArray[np.float64]:
    """Returns a probability for each of ``count`` views, float64 ``view 1``.

    Raises:
        ValueError: it is neither one number nor one for each view.
    """
    if len(values) not in (1, count):
        raise ValueError(f"{name} holds {len(values)} numbers for {count} views; expected 1 or {count}")
    return np.broadcast_to(np.array(values, np.float64), count)[:, None]


def plan_blur(
    probability: NDArray[np.float64],
    sigma: tuple[float, float],
    *,
    seed: int,
    positions: NDArray[np.int64],
    views: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Returns each view's standard deviation in pixels, float32 ``view batch``; 0 = not blurred.

    Args:
        probability: that a view is blurred, ``view 1``.
        sigma: smallest and largest standard deviation; uniform between them.
        seed: the run's seed.
        positions: global positions, ``batch``.
        views: numbers of the views, ``view 1``.
    """
    uniform = as_uniform(random_words(seed, positions, views, Purpose.BLUR)[..., 0, :])
    drawn = sigma[0] + uniform[..., 1] * (sigma[1] - sigma[0])
    return np.where(uniform[..., 0] < probability, drawn, 0.0).astype(np.float32)


def plan_solarise(
    probability: NDArray[np.float64], *, seed: int, positions: NDArray[np.int64], views: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Returns which views are solarised, bool ``view batch``; ``probability`` is ``view 1``."""
    solarised: NDArray[np.bool_] = (
        as_uniform(random_words(seed, positions, views, Purpose.SOLARISE)[..., 0, 0]) < probability
    )
    return solarised


def blur_window(sigma: NDArray[np.float32]) -> NDArray[np.int32]:
    """Returns the side of each blur's window in pixels, odd: three standard deviations to each side; 1 = no blur.

    What lies beyond three standard deviations weighs 0.3 %, less than half a level between neighbouring pixels of
    photographs.
    """
    return (2 * np.ceil(3 * sigma) + 1).astype(np.int32)


def blur_kernel(sigma: float) -> NDArray[np.float64]:
    """Returns the weights of a blur along one axis, float64, sum 1."""
    half = math.ceil(3 * sigma)
    weights = np.exp(-0.5 * (np.arange(-half, half + 1) / max(sigma, 1e-6)) ** 2)
    normalised: NDArray[np.float64] = weights / weights.sum()
    return normalised
