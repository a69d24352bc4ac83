"""The plan of colour changes, and the linear map that carries it out."""

import numpy as np
import pytest

from maestri.pipelines.colour import ColourConfig, colour_map, plan_colour
from maestri.pipelines.views import GLOBAL, ViewsConfig, plan_views

VIEWS = np.arange(2)[:, None]


def planned(config: ColourConfig, count: int = 4000, first: int = 0) -> np.ndarray:
    return plan_colour(config, seed=5, positions=np.arange(first, first + count), views=VIEWS)


def test_plan_colour__is_uniform_within_its_ranges() -> None:
    factors = planned(ColourConfig(brightness=0.4, contrast=0.2, saturation=0.1, hue=0.25))
    assert factors.shape == (2, 4000, 4) and factors.dtype == np.float32
    for column, (low, high) in enumerate(((0.6, 1.4), (0.8, 1.2), (0.9, 1.1), (-90, 90))):
        values = np.sort(factors[..., column].ravel())
        assert low <= values[0] and values[-1] <= high
        assert np.abs(values - np.linspace(low, high, len(values))).max() < 0.03 * (high - low)
    assert np.abs(np.corrcoef(factors.reshape(-1, 4).T) - np.eye(4)).max() < 0.05
    assert np.abs(np.corrcoef(factors[0, :, 0], factors[1, :, 0])[0, 1]) < 0.05


def test_plan_colour__leaves_some_views_alone() -> None:
    factors = planned(ColourConfig(brightness=0.4, hue=0.1, probability=0.8))
    unchanged = (factors == np.array((1, 1, 1, 0), np.float32)).all(-1)
    assert abs(unchanged.mean() - 0.2) < 0.02


def test_plan_colour__position_alone_equals_together() -> None:
    config = ColourConfig(brightness=0.4, hue=0.1)
    assert np.array_equal(planned(config, 10)[:, 7:8], planned(config, 1, first=7))


def test_plan_colour__golden_values() -> None:
    factors = planned(ColourConfig(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1), 1)
    assert factors.tolist() == [
        [[0.7771490812301636, 0.731036901473999, 0.857479453086853, 23.208209991455078]],
        [[1.0243542194366455, 1.3846206665039062, 1.1862388849258423, 17.50320816040039]],
    ]


def test_plan_views__without_colour_plans_none() -> None:
    sizes = np.full(3, 50)
    for probability, brightness, expected in ((1.0, 0.0, False), (0.0, 0.5, False), (0.5, 0.5, True)):
        config = ViewsConfig(colour=ColourConfig(brightness=brightness, probability=probability))
        plan = plan_views(config, seed=0, positions=np.arange(3), widths=sizes, heights=sizes, patch=16)
        assert (plan.groups[GLOBAL].colour is not None) is expected


def test_colour_map__of_no_change_is_the_identity() -> None:
    matrix, offset = colour_map(np.array((1, 1, 1, 0), np.float32))
    assert np.abs(matrix - np.eye(3)).max() < 1e-12 and not offset.any()


def test_colour_map__keeps_grey_grey_and_mid_grey_in_place() -> None:
    matrix, offset = colour_map(np.array((1, 0.3, 0.5, 77), np.float32))
    assert np.allclose(matrix @ np.full(3, 128.0) + offset, 128, atol=0.5)
    assert np.ptp(matrix @ np.full(3, 200.0) + offset) < 0.7


@pytest.mark.parametrize("field", ["brightness", "contrast", "saturation", "hue", "probability", "grey"])
def test_config__names_the_field_out_of_range(field: str) -> None:
    with pytest.raises(ValueError, match=f"views.colour.{field} is 1.5; expected 0 to"):
        ColourConfig(**{field: 1.5})
