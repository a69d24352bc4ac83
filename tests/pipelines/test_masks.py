"""Random token masks with an exact count."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestri.pipelines.masks import num_hidden, random_masks, split_indices

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
