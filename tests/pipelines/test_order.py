"""The order of samples as a pure function."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestri.pipelines.order import Order, OrderConfig, slice_of


def _order(num_rows: int, seed: int = 0) -> Order:
    return Order(OrderConfig(), num_rows=num_rows, seed=seed)


@given(num_rows=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 1000))
def test_rows__each_row_once_an_epoch(num_rows: int, seed: int, epoch: int) -> None:
    rows = _order(num_rows, seed).rows(np.arange(epoch * num_rows, (epoch + 1) * num_rows))
    assert np.array_equal(np.sort(rows), np.arange(num_rows))


@given(
    num_rows=st.integers(1, 10**12),
    seed=st.integers(0, 2**64 - 1),
    positions=st.lists(st.integers(0, 10**15), min_size=1, max_size=50),
)
def test_rows__any_position_alone_equals_together(num_rows: int, seed: int, positions: list[int]) -> None:
    together = _order(num_rows, seed).rows(np.array(positions))
    alone = [int(_order(num_rows, seed).rows(np.array([position]))[0]) for position in positions]
    assert together.tolist() == alone
    assert together.min() >= 0
    assert together.max() < num_rows


def test_rows__golden_values() -> None:
    # A change here breaks the order of every run: SAMPLE ORDER in the changelog.
    assert _order(1000, 42).rows(np.arange(8)).tolist() == [302, 559, 71, 442, 361, 243, 842, 315]
    assert _order(1000, 42).rows(np.arange(1000, 1008)).tolist() == [617, 838, 443, 301, 898, 748, 153, 400]
    assert _order(1_281_167, 7).rows(np.array([0, 1, 10**6, 10**12])).tolist() == [364516, 592269, 548184, 952470]
    # Where a square root in floating point is rounded up to a whole number.
    expected = [1262895261559218544, 291147774912940431, 3661928303567070924]
    assert _order(2**62 - 1, 3).rows(np.array([0, 1, 2**62 - 2])).tolist() == expected
    expected = [4039127998267854285, 1883448605214154611, 1312744323031731007]
    assert _order((2**31 - 1) ** 2, 3).rows(np.array([0, 1, 2**62 - 2])).tolist() == expected


def test_rows__epochs_and_seeds_differ() -> None:
    order = _order(10_000, 1)
    first, second = order.rows(np.arange(10_000)), order.rows(np.arange(10_000, 20_000))
    other = _order(10_000, 2).rows(np.arange(10_000))
    # Two independent permutations agree at one place on average.
    assert (first == second).sum() < 10
    assert (first == other).sum() < 10


def test_rows__places_and_neighbours_are_uniform() -> None:
    num_rows, epochs = 24, 4000
    rows = _order(num_rows, 5).rows(np.arange(num_rows * epochs)).reshape(epochs, num_rows)
    expected = epochs / num_rows
    for place in range(num_rows):
        counts = np.bincount(rows[:, place], minlength=num_rows)
        assert ((counts - expected) ** 2 / expected).sum() < 60  # chi-square, 23 degrees of freedom, p = 4e-5
    steps = np.bincount((rows[:, 1:] - rows[:, :-1]).ravel() % num_rows, minlength=num_rows)
    expected = epochs
    assert steps[0] == 0
    assert ((steps[1:] - expected) ** 2 / expected).sum() < 60


@pytest.mark.parametrize("num_rows", [0, -1])
def test_order__refuses_no_rows(num_rows: int) -> None:
    with pytest.raises(ValueError, match="num_rows is"):
        _order(num_rows)


@given(world=st.integers(1, 64), size=st.integers(1, 100))
def test_slice_of__cuts_the_batch_evenly(world: int, size: int) -> None:
    global_size = 2 * size * world
    slices = [slice_of(rank, world, global_size) for rank in range(world)]
    assert slices[0].start == 0
    assert slices[-1].stop == global_size
    assert all(before.stop == after.start for before, after in zip(slices, slices[1:], strict=False))
    assert {part.stop - part.start for part in slices} == {2 * size}


@pytest.mark.parametrize(
    ("world", "global_size", "nearest"), [(3, 256, "252 or 258"), (1, 3, "2 or 4"), (4, 4, "the nearest that does: 8")]
)
def test_slice_of__refuses_unequal_slices(world: int, global_size: int, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"global batch of {global_size} .* {world} rank.*{nearest}"):
        slice_of(0, world, global_size)


def test_slice_of__refuses_rank_outside_world() -> None:
    with pytest.raises(ValueError, match="rank is 2"):
        slice_of(2, 2, 4)
