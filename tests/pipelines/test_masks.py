"""Random token masks with an exact count, counts that vary, and the indices of what is hidden."""

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestri.pipelines.masks import MaskConfig, num_hidden, plan_masks, random_masks, split_indices

_VIEWS = np.arange(2)[:, None]


@given(num_tokens=st.integers(1, 300), ratio=st.floats(0, 0.999), seed=st.integers(0, 2**64 - 1))
def test_random_masks__exact_count(num_tokens: int, ratio: float, seed: int) -> None:
    count = num_hidden(ratio, num_tokens)
    assert 0 <= count < num_tokens
    masks = random_masks(seed, np.arange(5), _VIEWS, num_tokens=num_tokens, count=count)
    assert masks.shape == (2, 5, num_tokens)
    assert (masks.sum(axis=-1) == count).all()


def test_num_hidden__as_in_mae() -> None:
    assert num_hidden(0.75, 196) == 147
    assert num_hidden(0.75, 49) == 37
    assert num_hidden(0.0, 49) == 0


def test_random_masks__tokens_and_pairs_are_uniform() -> None:
    masks = random_masks(1, np.arange(20_000), np.zeros(1, np.int64)[:, None], num_tokens=16, count=12)[0]
    assert np.abs(masks.mean(axis=0) - 12 / 16).max() < 0.015  # 5 standard deviations
    pairs = (masks.T.astype(float) @ masks) / len(masks)
    off_diagonal = pairs[~np.eye(16, dtype=bool)]
    assert np.abs(off_diagonal - 12 * 11 / (16 * 15)).max() < 0.018


def test_random_masks__views_and_neighbours_are_independent() -> None:
    visible = ~random_masks(42, np.arange(20_000), _VIEWS, num_tokens=16, count=12)
    # Two independent masks leave 4 · 4 / 16 = 1 token visible in both, on average.
    assert abs((visible[0] & visible[1]).sum(axis=-1).mean() - 1) < 0.03
    assert abs((visible[0, 1:] & visible[0, :-1]).sum(axis=-1).mean() - 1) < 0.03


@pytest.mark.parametrize("count", [0, 9, 15])
def test_split_indices__ascending_and_complementary(count: int) -> None:
    masks = random_masks(4, np.arange(6), _VIEWS, num_tokens=16, count=count)
    visible, hidden = split_indices(masks)
    assert visible.shape == (2, 6, 16 - count)
    assert hidden.shape == (2, 6, count)
    for view, sample in np.ndindex(2, 6):
        assert visible[view, sample].tolist() == np.flatnonzero(~masks[view, sample]).tolist()
        assert hidden[view, sample].tolist() == np.flatnonzero(masks[view, sample]).tolist()


def test_split_indices__no_samples_and_no_tokens() -> None:
    assert [indices.shape for indices in split_indices(np.zeros((2, 0, 16), np.bool_))] == [(2, 0, 0)] * 2
    assert [indices.shape for indices in split_indices(np.zeros((2, 3, 0), np.bool_))] == [(2, 3, 0)] * 2


def test_random_masks__golden() -> None:
    masks = random_masks(7, np.arange(50), _VIEWS, num_tokens=49, count=37)
    assert np.flatnonzero(~masks[1, 3]).tolist() == [1, 10, 11, 18, 19, 24, 28, 36, 37, 39, 44, 45]


def test_random_masks__count_of_its_own_changes_no_other_mask() -> None:
    counts = np.array([[0, 3, 15], [7, 0, 1]])
    masks = random_masks(3, np.arange(3), _VIEWS, num_tokens=16, count=counts)
    assert (masks.sum(axis=-1) == counts).all()
    for view, sample in np.ndindex(2, 3):
        alone = random_masks(3, np.arange(3), _VIEWS, num_tokens=16, count=int(counts[view, sample]))
        assert (masks[view, sample] == alone[view, sample]).all()


_KINDS: list[Literal["random", "block"]] = ["random", "block"]


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("varying", [{}, {"spread": 0.2, "unmasked": 0.4}], ids=["constant", "varying"])
def test_plan_masks__each_position_and_view_alone(kind: Literal["random", "block"], varying: dict[str, float]) -> None:
    config = MaskConfig(kind=kind, ratio=0.6, **varying)
    positions = np.array([0, 1, 2, 3, 1 << 40, (1 << 40) + 1])
    batch = plan_masks(config, seed=9, positions=positions, views=_VIEWS, grid=14)
    for view, sample in np.ndindex(batch.shape[:2]):
        alone = plan_masks(config, seed=9, positions=positions[sample : sample + 1], views=_VIEWS[[view]], grid=14)
        assert (alone[0, 0] == batch[view, sample]).all()
    assert not (batch == plan_masks(config, seed=10, positions=positions, views=_VIEWS, grid=14)).all()


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("varying", [{}, {"spread": 0.2, "unmasked": 0.4}], ids=["constant", "varying"])
def test_plan_masks__shared(kind: Literal["random", "block"], varying: dict[str, float]) -> None:
    positions = np.arange(64)
    own, shared = (
        plan_masks(
            MaskConfig(kind=kind, ratio=0.6, shared=shared, **varying),
            seed=9,
            positions=positions,
            views=np.arange(3)[:, None],
            grid=7,
        )
        for shared in (False, True)
    )
    assert shared.shape == own.shape == (3, 64, 49)
    assert (shared == own[0]).all()
    assert not (own[1] == own[0]).all()


@pytest.mark.parametrize("kind", _KINDS)
def test_plan_masks__ibot_counts(kind: Literal["random", "block"]) -> None:
    config = MaskConfig(kind=kind, ratio=0.3, spread=0.2, unmasked=0.5)
    counts = plan_masks(config, seed=5, positions=np.arange(4000), views=_VIEWS, grid=14).sum(axis=-1)
    unmasked = counts == 0
    assert abs(unmasked.mean() - 0.5) < 0.03  # 5 standard deviations
    ratios = counts[~unmasked] / 196
    assert ratios.min() == pytest.approx(0.1, abs=0.006)
    assert ratios.max() == pytest.approx(0.5, abs=0.006)
    assert abs(ratios.mean() - 0.3) < 0.01
    assert abs(ratios.std() - 0.4 / 12**0.5) < 0.005  # a uniform spread's
    # The views of a sample, and its neighbours, draw their own.
    assert abs((unmasked[0] & unmasked[1]).mean() - 0.25) < 0.035
    assert abs(np.corrcoef(counts[0, 1:], counts[0, :-1])[0, 1]) < 0.08


def test_plan_masks__ends_of_unmasked() -> None:
    views = {"seed": 1, "positions": np.arange(20), "views": _VIEWS, "grid": 4}
    assert not plan_masks(MaskConfig(unmasked=1.0), **views).any()
    assert plan_masks(MaskConfig(ratio=0.5, spread=0.25), **views).sum(axis=-1).min() >= 4


def test_mask_config__constant_count() -> None:
    assert MaskConfig().constant_count
    assert not MaskConfig(spread=0.1).constant_count
    assert not MaskConfig(unmasked=0.1).constant_count


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("ratio", {"ratio": 1.0}),
        ("spread", {"ratio": 0.1, "spread": 0.2}),
        ("spread", {"ratio": 0.8, "spread": 0.2}),
        ("spread", {"spread": -0.1}),
        ("unmasked", {"unmasked": 1.5}),
        ("unmasked", {"unmasked": -0.5}),
        ("smallest_block", {"smallest_block": 0}),
        ("aspect", {"aspect": 0.0}),
        ("aspect", {"aspect": 1.5}),
    ],
)
def test_mask_config__names_the_field(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"views\.mask\.{field} is {values[field]}; expected "):
        MaskConfig(**values)
