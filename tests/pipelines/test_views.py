"""Plans of views: torchvision's distribution, purity, golden values."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from maestri.pipelines.colour import ColourConfig
from maestri.pipelines.corruption import CorruptionConfig
from maestri.pipelines.exact_math import exp, log
from maestri.pipelines.filters import BlurConfig
from maestri.pipelines.views import GLOBAL, LOCAL, GroupPlan, LocalConfig, ViewsConfig, plan_center, plan_views


def _plan(
    config: ViewsConfig, positions: np.ndarray, width: int = 500, height: int = 375, seed: int = 1, patch: int = 16
) -> GroupPlan:
    widths, heights = np.full(len(positions), width), np.full(len(positions), height)
    return plan_views(config, seed=seed, positions=positions, widths=widths, heights=heights, patch=patch).groups[
        GLOBAL
    ]


@settings(max_examples=50)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=30),
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**50),
)
def test_plan_views__windows_lie_in_the_image(sizes: list[tuple[int, int]], seed: int, first: int) -> None:
    widths, heights = np.array(sizes).T
    positions = np.arange(first, first + len(sizes))
    plan = plan_views(ViewsConfig(), seed=seed, positions=positions, widths=widths, heights=heights, patch=16)
    top, left, height, width = np.moveaxis(plan.groups[GLOBAL].windows, -1, 0)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top + height <= heights).all()
    assert (left + width <= widths).all()


@pytest.mark.parametrize(("width", "height"), [(500, 375), (28, 28), (640, 200)])
def test_plan_views__distribution_is_torchvisions(width: int, height: int) -> None:
    num_samples = 6000
    ours = _plan(ViewsConfig(count=1), np.arange(num_samples), width, height).windows[0].astype(float)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(num_samples)], float
    )
    # Two-sample Kolmogorov-Smirnov at p = 1e-4 on each coordinate, the area and the ratio.
    bound = 2.23 * np.sqrt(2 / num_samples)
    derived = [np.column_stack((w, w[:, 2] * w[:, 3], w[:, 3] / w[:, 2])) for w in (ours, theirs)]
    for column in range(6):
        a, b = (np.sort(values[:, column]) for values in derived)
        grid = np.union1d(a, b)
        distance = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / num_samples
        assert distance < bound, f"coordinate {column}: {distance:.4f}"


@pytest.mark.parametrize(
    ("width", "height", "window"),
    [(500, 33, (0, 228, 33, 44)), (33, 500, (228, 0, 44, 33)), (1, 1, (0, 0, 1, 1))],
)
def test_plan_views__falls_back_to_the_centre(width: int, height: int, window: tuple[int, ...]) -> None:
    config = ViewsConfig(count=1, scale=(1.0, 1.0))
    windows = _plan(config, np.arange(64), width, height).windows[0]
    assert {tuple(found) for found in windows.tolist()} == {window}


def test_plan_views__position_alone_equals_together() -> None:
    positions = np.arange(100, 164)
    together = _plan(ViewsConfig(), positions)
    alone = _plan(ViewsConfig(), positions[37:38])
    for name in ("windows", "flip", "token_mask"):
        assert np.array_equal(getattr(together, name)[:, 37:38], getattr(alone, name))


def test_plan_views__views_and_seeds_differ() -> None:
    plan, other = _plan(ViewsConfig(), np.arange(64)), _plan(ViewsConfig(), np.arange(64), seed=2)
    assert (plan.windows[0] != plan.windows[1]).any(axis=-1).all()
    assert (plan.token_mask[0] != plan.token_mask[1]).any(axis=-1).all()
    assert (plan.windows != other.windows).any(axis=-1).mean() > 0.99


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_plan_views__flip_probability(probability: float) -> None:
    flip = _plan(ViewsConfig(flip=probability), np.arange(4000)).flip
    assert flip.shape == (2, 4000)
    assert abs(flip.mean() - probability) < 0.03


def test_plan_views__golden_values() -> None:
    # A change here breaks every run's views: SAMPLE ORDER in the changelog.
    plan = _plan(ViewsConfig(size=28), np.array([0, 1, 10**12]), seed=42, patch=7)
    assert plan.windows.tolist() == [
        [[1, 11, 315, 402], [40, 224, 333, 259], [70, 164, 276, 289]],
        [[8, 21, 363, 444], [67, 149, 200, 220], [42, 170, 282, 316]],
    ]
    assert plan.flip.tolist() == [[False, True, True], [True, False, True]]
    bits = (plan.token_mask * (1 << np.arange(16))).sum(axis=-1)
    assert bits.tolist() == [[60349, 15743, 65237], [63347, 23935, 65445]]


def test_plan_center__one_window() -> None:
    plan = plan_center(224, crop_fraction=0.875, widths=np.array([500, 28]), heights=np.array([375, 40]))
    group = plan.groups[GLOBAL]
    side, small = 375 * 0.875, 28 * 0.875
    expected = [[(375 - side) / 2, (500 - side) / 2, side, side], [(40 - small) / 2, (28 - small) / 2, small, small]]
    assert np.allclose(group.windows[0], expected)
    assert group.windows.dtype == np.float32
    assert not group.flip.any()


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_plan_center__refuses_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match="crop_fraction is"):
        plan_center(224, crop_fraction=fraction, widths=np.array([1]), heights=np.array([1]))


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0},
        {"count": 0},
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 0.2)},
        {"flip": 1.5},
        {"solarise": (0.1, 1.2)},
        {"solarise": ()},
    ],
)
def test_views_config__refuses(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"views\.{next(iter(change))} is"):
        replace(ViewsConfig(), **change)


@pytest.mark.parametrize("change", [{"count": -1}, {"count": 1, "size": 0}, {"count": 1, "scale": (0.5, 0.1)}])
def test_views_config__refuses_local(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"views\.local\.{list(change)[-1]} is"):
        ViewsConfig(local=LocalConfig(**change))


def test_views_config__refuses_a_number_of_probabilities() -> None:
    with pytest.raises(ValueError, match=r"views\.blur\.probability holds 3 numbers for 2 views"):
        ViewsConfig(blur=BlurConfig(probability=(0.1, 0.2, 0.3)))
    with pytest.raises(ValueError, match=r"views\.local\.solarise holds 2 numbers for 4 views"):
        ViewsConfig(local=LocalConfig(count=4, solarise=(0.1, 0.2)))


def test_plan_views__global_views_do_not_depend_on_local_ones() -> None:
    positions, sizes = np.arange(32), np.full(32, 300)
    plans = [
        plan_views(config, seed=3, positions=positions, widths=sizes, heights=sizes, patch=16).groups
        for config in (ViewsConfig(), ViewsConfig(local=LocalConfig(count=3)))
    ]
    assert list(plans[0]) == [GLOBAL]
    assert list(plans[1]) == [GLOBAL, LOCAL]
    assert np.array_equal(plans[0][GLOBAL].windows, plans[1][GLOBAL].windows)
    local = plans[1][LOCAL]
    assert local.size == 96
    assert local.windows.shape == (3, 32, 4)
    assert not local.token_mask.any()
    assert local.token_mask.shape == (3, 32, 36)
    share = local.windows[..., 2] * local.windows[..., 3] / 300**2
    assert 0.045 < share.min() < 0.1 and 0.2 < share.max() < 0.26


def test_plan_views__blur_and_solarise_by_view() -> None:
    config = ViewsConfig(blur=BlurConfig(probability=(1.0, 0.1), sigma=(0.5, 1.5)), solarise=(0.0, 0.2))
    group = _plan(config, np.arange(4000))
    assert group.blur is not None and group.solarise is not None
    assert (group.blur[0] > 0).all()
    assert abs((group.blur[1] > 0).mean() - 0.1) < 0.02
    blurred = np.sort(group.blur[0])
    assert np.abs(blurred - np.linspace(0.5, 1.5, 4000)).max() < 0.04
    assert not group.solarise[0].any()
    assert abs(group.solarise[1].mean() - 0.2) < 0.03
    plain = _plan(ViewsConfig(), np.arange(2))
    assert plain.blur is None and plain.solarise is None and plain.corruption is None


def test_plan_views__grey_is_no_saturation() -> None:
    group = _plan(ViewsConfig(colour=ColourConfig(grey=0.2, saturation=0.3, probability=0.5)), np.arange(4000))
    assert group.colour is not None
    saturation = group.colour[..., 2]
    assert abs((saturation == 0).mean() - 0.2) < 0.02
    assert abs((saturation == 1).mean() - 0.4) < 0.02


def test_plan_views__corrupted_views_have_a_plan_and_a_mask() -> None:
    group = _plan(ViewsConfig(corruption=CorruptionConfig(coverage=0.5, other=0.0)), np.arange(64))
    assert group.corruption is not None
    assert (group.token_mask.mean(-1) >= 0.5).all()


def test_exp_and_log__precise() -> None:
    x = np.linspace(-5, 5, 1001)
    assert np.abs(exp(x) / np.exp(x) - 1).max() < 1e-15 * 4
    ratios = np.array([0.05, 0.3, 0.5, 0.75, 1.0, 4 / 3, 2.0, 17.0])
    assert np.allclose([log(float(ratio)) for ratio in ratios], np.log(ratios), rtol=0, atol=1e-14)
