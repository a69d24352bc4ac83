import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from maestri.shards.plan import cut, recipe_of, shuffled


@given(st.integers(1, 500), st.integers(0, 2**63 - 1))
def test_shuffled__is_a_permutation(num_samples: int, seed: int) -> None:
    assert sorted(shuffled(num_samples, seed).tolist()) == list(range(num_samples))


def test_shuffled__golden() -> None:
    assert shuffled(10, 0).tolist() == [5, 7, 8, 2, 9, 0, 3, 1, 6, 4]
    assert shuffled(10, 7).tolist() == [9, 5, 4, 2, 3, 1, 0, 8, 7, 6]


def test_shuffled__spreads_classes_evenly() -> None:
    labels = np.repeat(np.arange(10), 1000)[shuffled(10_000, 3)]
    counts = np.bincount(labels[:2000], minlength=10)
    assert abs(counts - 200).max() < 60  # over four standard deviations


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=200), st.integers(1, 5000))
def test_cut__covers_everything_once(sizes: list[int], shard_bytes: int) -> None:
    bounds = cut(np.array(sizes, np.int64), shard_bytes)
    assert bounds[0] == 0 and bounds[-1] == len(sizes)
    assert (np.diff(bounds) > 0).all()


@given(st.integers(1, 300), st.integers(1, 40))
def test_cut__makes_even_shards(count: int, per_shard: int) -> None:
    lengths = np.diff(cut(np.full(count, 100, np.int64), 100 * per_shard))
    assert lengths.max() - lengths.min() <= 1


def test_recipe_of__differs_with_every_setting() -> None:
    assert len({recipe_of("a", {"seed": 0}), recipe_of("b", {"seed": 0}), recipe_of("a", {"seed": 1})}) == 3


def test_shuffled__first_rows_are_a_uniform_subset() -> None:
    """The mean of m of n numbers drawn without replacement has this deviation; five of them are allowed."""
    num, part = 100_000, 10_000
    deviation = np.sqrt((num**2 - 1) / 12 / part * (num - part) / (num - 1))
    for seed in range(5):
        assert abs(shuffled(num, seed)[:part].mean() - (num - 1) / 2) < 5 * deviation


def test_cut__huge_sets_do_not_overflow() -> None:
    sizes = np.full(1_000_000, 10**8, np.int64)
    assert len(cut(sizes, 2**28)) - 1 == round(10**14 / 2**28)
