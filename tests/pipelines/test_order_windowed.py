"""The windowed order as a pure function, and what its slices have in common with the full one's."""

import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from maestri.pipelines.order import Order, OrderConfig, slice_of

SEEDS = st.integers(0, 2**64 - 1)
SIZES = st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 10, 40]) | st.integers(0, 300), min_size=1, max_size=40).filter(any)


def _order(sizes: list[int], window: int, seed: int = 0) -> Order:
    config = OrderConfig(kind="windowed", window=window)
    return Order(config, num_rows=sum(sizes), seed=seed, shard_sizes=np.array(sizes))


def _epoch(order: Order, epoch: int) -> NDArray[np.int64]:
    return order.rows(np.arange(epoch * order.num_rows, (epoch + 1) * order.num_rows))


@given(sizes=SIZES, window=st.integers(1, 45), seed=SEEDS, epoch=st.integers(0, 10**6))
@example(sizes=[0, 0, 1], window=64, seed=0, epoch=0)
@example(sizes=[1] * 100, window=1, seed=0, epoch=3)
def test_rows__each_row_once_an_epoch(sizes: list[int], window: int, seed: int, epoch: int) -> None:
    rows = _epoch(_order(sizes, window, seed), epoch)
    assert rows.dtype == np.int64
    assert np.array_equal(np.sort(rows), np.arange(sum(sizes)))


@given(sizes=SIZES, window=st.integers(1, 45), seed=SEEDS, epoch=st.integers(0, 1000))
def test_rows__a_window_is_whole_shards(sizes: list[int], window: int, seed: int, epoch: int) -> None:
    order = _order(sizes, window, seed)
    shards = np.repeat(np.arange(len(sizes)), sizes)[_epoch(order, epoch)]
    at, num_shards = 0, sum(size > 0 for size in sizes)
    num_windows = -(-num_shards // window)
    for number in range(num_windows):
        num_members = (number + 1) * num_shards // num_windows - number * num_shards // num_windows
        assert num_shards // num_windows <= num_members <= window
        _, first = np.unique(shards[at:], return_index=True)
        members = shards[at:][np.sort(first)[:num_members]]
        end = at + sum(sizes[shard] for shard in members)
        assert set(shards[at:end].tolist()) == set(members.tolist())
        at = end
    assert at == len(shards)


@given(
    sizes=SIZES,
    window=st.integers(1, 45),
    seed=SEEDS,
    positions=st.lists(st.integers(0, 10**4) | st.integers(0, 10**15), min_size=1, max_size=40),
)
def test_rows__any_position_alone_equals_together(
    sizes: list[int], window: int, seed: int, positions: list[int]
) -> None:
    together = _order(sizes, window, seed).rows(np.array(positions))
    alone = [int(_order(sizes, window, seed).rows(np.array([position]))[0]) for position in positions]
    assert together.tolist() == alone


@settings(deadline=None)
@given(sizes=SIZES, window=st.integers(1, 45), seed=SEEDS, batch=st.integers(1, 700))
def test_rows__sequence_equals_epochs(sizes: list[int], window: int, seed: int, batch: int) -> None:
    """Also where batches lie in several windows and epochs, and as many epochs are opened as to forget the first."""
    order, num_rows = _order(sizes, window, seed), sum(sizes)
    whole = np.concatenate([_epoch(order, epoch) for epoch in range(6)])
    other = _order(sizes, window, seed)
    starts = range(0, 6 * num_rows, max(batch, num_rows // 10))
    for start in (*starts, 0, 5 * num_rows):
        positions = np.arange(start, min(start + batch, 6 * num_rows))
        assert np.array_equal(other.rows(positions), whole[positions])


@settings(deadline=None)
@given(
    world=st.integers(1, 64),
    part=st.integers(1, 6),
    index=st.integers(0, 50),
    kind=st.sampled_from(["full", "windowed"]),
)
def test_rows__slices_are_the_global_batch(world: int, part: int, index: int, kind: str) -> None:
    sizes = np.array([3, 0, 500, 41, 1, 1, 77])
    config = OrderConfig(kind=kind, window=2)
    global_size = 2 * part * world

    def rows(positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return Order(config, num_rows=623, seed=9, shard_sizes=sizes).rows(positions)

    first = index * global_size
    parts = [slice_of(rank, world, global_size) for rank in range(world)]
    on_ranks = [rows(np.arange(first + part.start, first + part.stop)) for part in parts]
    assert np.array_equal(np.concatenate(on_ranks), rows(np.arange(first, first + global_size)))


@pytest.mark.parametrize("kind", ["full", "windowed"])
def test_rows__global_batch_is_the_same_for_every_world(kind: str) -> None:
    config, sizes = OrderConfig(kind=kind, window=4), np.full(100, 50)
    global_size, tried = 2 * 4 * 9 * 16 * 5 * 7, 0
    expected = Order(config, num_rows=5000, seed=1, shard_sizes=sizes).rows(np.arange(global_size))
    for world in range(1, 65):
        if global_size % (2 * world):
            with pytest.raises(ValueError, match="does not divide"):
                slice_of(0, world, global_size)
            continue
        orders = [Order(config, num_rows=5000, seed=1, shard_sizes=sizes) for _ in range(world)]
        parts = [slice_of(rank, world, global_size) for rank in range(world)]
        rows = [order.rows(np.arange(part.start, part.stop)) for order, part in zip(orders, parts, strict=True)]
        assert np.array_equal(np.concatenate(rows), expected)
        tried += 1
    assert tried >= 30


def test_rows__golden_values() -> None:
    # A change here breaks the order of every run: SAMPLE ORDER in the changelog.
    small = _order([3, 0, 5, 1, 4], 2, seed=42)
    assert _epoch(small, 0).tolist() == [9, 11, 10, 8, 12, 0, 6, 2, 1, 5, 7, 4, 3]
    assert _epoch(small, 1).tolist() == [9, 10, 12, 11, 8, 6, 4, 1, 5, 7, 2, 0, 3]
    large = _order([1000] * 1281 + [167], 64, seed=7)
    assert large.rows(np.array([0, 1, 10**6, 1_281_166, 1_281_167, 10**12])).tolist() == [
        456779,
        671790,
        132394,
        246663,
        45846,
        826650,
    ]


def test_rows__epochs_seeds_and_windows_differ() -> None:
    sizes = [100] * 100
    order = _order(sizes, 10, seed=1)
    first = _epoch(order, 0)
    # Two independent permutations agree at one place on average.
    for other in (_epoch(order, 1), _epoch(_order(sizes, 10, seed=2), 0), _epoch(_order(sizes, 12, seed=1), 0)):
        assert (first == other).sum() < 10
    # Nor are the windows of an epoch shuffled alike: which of its rows stands first, second, …
    ranks = np.argsort(np.argsort(first.reshape(10, 1000), 1), 1)
    assert max((ranks[0] == ranks[at]).sum() for at in range(1, 10)) < 10


def test_rows__all_shards_in_a_window_are_uniform() -> None:
    num_rows, epochs = 24, 2000
    order = _order([5, 0, 7, 1, 11], 4, seed=5)
    rows = np.stack([_epoch(order, epoch) for epoch in range(epochs)])
    expected = epochs / num_rows
    for place in range(num_rows):
        counts = np.bincount(rows[:, place], minlength=num_rows)
        assert ((counts - expected) ** 2 / expected).sum() < 60  # chi-square, 23 degrees of freedom, p = 4e-5


def test_rows__shards_are_shuffled_uniformly() -> None:
    num_shards, epochs = 24, 2000
    order = _order([1] * num_shards, 1, seed=5)
    rows = np.stack([_epoch(order, epoch) for epoch in range(epochs)])
    expected = epochs / num_shards
    for place in range(num_shards):
        counts = np.bincount(rows[:, place], minlength=num_shards)
        assert ((counts - expected) ** 2 / expected).sum() < 60


def test_order__empty_shards_change_nothing() -> None:
    rows = _epoch(_order([3, 5, 2], 2, seed=3), 4)
    assert np.array_equal(_epoch(_order([0, 3, 0, 0, 5, 2, 0], 2, seed=3), 4), rows)


@pytest.mark.parametrize(
    ("sizes", "error"),
    [
        (None, "data.order.kind is 'windowed', which needs"),
        ([5, 4], "sum to 9; expected 10"),
        ([11, -1], "expected 10, the number of rows, none below 0"),
        ([[5], [5]], "expected 10"),
    ],
)
def test_order__refuses_shard_sizes(sizes: list[int] | None, error: str) -> None:
    given_sizes = None if sizes is None else np.array(sizes)
    with pytest.raises(ValueError, match=error):
        Order(OrderConfig(kind="windowed"), num_rows=10, seed=0, shard_sizes=given_sizes)


def test_order_config__refuses_no_window() -> None:
    with pytest.raises(ValueError, match="data.order.window is 0; expected at least 1"):
        OrderConfig(kind="windowed", window=0)


def test_shards_open__is_the_bound() -> None:
    assert _order([5, 0, 5, 5], 2).shards_open == 2
    assert _order([5, 0, 5, 5], 64).shards_open == 3
    assert Order(OrderConfig(), num_rows=10, seed=0).shards_open is None


def test_fingerprint__differs_where_the_order_does() -> None:
    full = Order(OrderConfig(), num_rows=10, seed=0).fingerprint()
    assert full == {"order": "full", "num_rows": 10, "window": 0, "shard_sizes": ""}
    assert Order(OrderConfig(window=5), num_rows=10, seed=0, shard_sizes=np.array([4, 6])).fingerprint() == full
    prints = [
        _order(sizes, window).fingerprint() for sizes, window in (([4, 6], 1), ([4, 6], 2), ([6, 4], 2), ([10], 1))
    ]
    assert len({tuple(sorted(fingerprint.items())) for fingerprint in [full, *prints]}) == 5
    assert _order([4, 0, 6], 64).fingerprint() == prints[1]
    assert set(map(type, full.values())) == {int, str}


def test_order__pickled_goes_on() -> None:
    order = _order([40, 60, 11], 2)
    expected = _epoch(order, 1)
    assert np.array_equal(_epoch(pickle.loads(pickle.dumps(order)), 1), expected)
