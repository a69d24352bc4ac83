"""Philox against the published vectors, and the counter's layout."""

import numpy as np
import pytest

from maestri.pipelines.counter_rng import Purpose, as_integer_below, as_uniform, philox4x32, random_words

# Random123 1.14, tests/kat_vectors, "philox4x32 10": counter, key, result.
_KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), _KNOWN_ANSWERS)
def test_philox4x32__known_answers(counter: str, key: str, result: str) -> None:
    key0, key1 = _words(key)
    block = philox4x32(np.array(_words(counter), np.uint64), (key0, key1))
    assert block.tolist() == _words(result)


def test_philox4x32__vectorised_equals_one_by_one() -> None:
    counters = np.random.default_rng(0).integers(0, 1 << 32, (4, 5, 3), np.uint64)
    together = philox4x32(counters, (7, 8))
    for i, j in np.ndindex(5, 3):
        assert together[:, i, j].tolist() == philox4x32(counters[:, i, j], (7, 8)).tolist()


def test_random_words__counter_layout() -> None:
    position, view, draw, seed = (5 << 32) + 6, 3, 9, (11 << 32) + 12
    words = random_words(seed, np.array([position]), view, Purpose.TOKEN_MASK, num_draws=1, first_draw=draw)
    counter = np.array([6, 5, 3, (int(Purpose.TOKEN_MASK) << 24) + draw], np.uint64)
    assert words.shape == (1, 1, 4)
    assert words[0, 0].tolist() == philox4x32(counter, (12, 11)).tolist()


def test_random_words__broadcasts_views_and_positions() -> None:
    positions, views = np.arange(5), np.arange(2)[:, None]
    words = random_words(1, positions, views, Purpose.CROP, num_draws=3)
    assert words.shape == (2, 5, 3, 4)
    assert len(np.unique(words)) == words.size
    alone = random_words(1, positions[3:4], 1, Purpose.CROP, num_draws=1, first_draw=2)
    assert (words[1, 3, 2] == alone[0, 0]).all()


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_random_words__refuses_seed(seed: int) -> None:
    with pytest.raises(ValueError, match="seed is"):
        random_words(seed, np.arange(2), 0, Purpose.CROP)


def test_as_uniform__open_interval() -> None:
    values = as_uniform(np.array([0, 0xFFFFFFFF], np.uint32))
    assert 0 < values[0] < values[1] < 1


def test_as_integer_below__covers_range_evenly() -> None:
    words = random_words(3, np.arange(20_000), 0, Purpose.CROP).ravel()
    values = as_integer_below(words, np.full(words.shape, 7))
    counts = np.bincount(values, minlength=7)
    assert len(counts) == 7
    expected = words.size / 7
    assert ((counts - expected) ** 2 / expected).sum() < 22.5  # chi-square, 6 degrees of freedom, p = 0.001
