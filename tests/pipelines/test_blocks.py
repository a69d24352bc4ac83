"""Packed rectangles, which block masks and corruption are made of, and covering a square with them."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from maestri.pipelines import blocks
from maestri.pipelines.blocks import count_cells, cover, pack_rectangles, unpack_cells
from maestri.pipelines.counter_rng import Purpose, random_words


@settings(deadline=None)
@given(side=st.integers(1, 140), data=st.data())
def test_pack_rectangles__round_trip(side: int, data: st.DataObject) -> None:
    count = 5
    sides = st.lists(st.integers(0, side), min_size=count, max_size=count)
    height, width = np.array(data.draw(sides)), np.array(data.draw(sides))
    top = np.array([data.draw(st.integers(0, side - int(length))) for length in height])
    left = np.array([data.draw(st.integers(0, side - int(length))) for length in width])
    packed = pack_rectangles(top, left, height, width, side=side)
    cells = unpack_cells(packed, side=side)
    assert (count_cells(packed) == height * width).all()
    expected = np.zeros((count, side, side), np.bool_)
    for number in range(count):
        expected[number, top[number] : top[number] + height[number], left[number] : left[number] + width[number]] = True
    assert (cells == expected).all()


def test_count_cells__without_bitwise_count(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = np.random.default_rng(0).integers(0, 1 << 63, (3, 4, 5)).astype(np.uint64)
    expected = np.array([int(word).bit_count() for word in packed.ravel()]).reshape(3, 4, 5).sum(axis=-1)
    assert (count_cells(packed) == expected).all()
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert (blocks.count_cells(packed) == expected).all()


def _words_of(first_sample: int) -> Callable[[NDArray[np.int64], int, int], NDArray[np.uint32]]:
    def words(some: NDArray[np.int64], first: int, count: int) -> NDArray[np.uint32]:
        return random_words(3, first_sample + some, 0, Purpose.CORRUPTION, num_draws=count, first_draw=first)

    return words


@pytest.mark.parametrize("side", [14, 28, 70])
def test_cover__one_block_after_the_other(side: int) -> None:
    needed = np.array([1, side * side // 4, side * side // 2, side * side * 9 // 10])
    covered = cover(_words_of(0), needed, np.zeros(4, np.int64), sides=(2, side // 3), side=side)
    words = _words_of(0)(np.arange(4), 0, blocks.MOST_BLOCKS).astype(int)
    for sample in range(4):
        expected = np.zeros((side, side), np.bool_)
        for block in words[sample]:
            if expected.sum() >= needed[sample]:
                break
            height, width = ((word * (side // 3 - 1) >> 32) + 2 for word in block[:2])
            top, left = (block[2] * (side + 1 - height) >> 32), (block[3] * (side + 1 - width) >> 32)
            expected[top : top + height, left : left + width] = True
        assert expected.sum() >= needed[sample]
        assert (covered[sample] == expected).all()


@pytest.mark.parametrize("side", [7, 28, 70])
def test_cover__what_blocks_leave_is_covered_exactly(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MOST_BLOCKS", 16)
    needed = np.full(40, side * side // 2)
    starts = np.arange(40) * side * side // 40
    covered = cover(_words_of(0), needed, starts, sides=(1, 1), side=side).reshape(40, -1)
    assert (covered.sum(axis=1) == needed).all()
    for sample, start in enumerate(starts):
        assert np.roll(covered[sample], -start)[: side * side // 2 - 16].all()


@pytest.mark.parametrize("side", [7, 28, 70])
def test_cover__same_however_many_are_done_at_once(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    needed, starts = np.arange(1, 31) * side * side // 30, np.arange(30)
    covered = cover(_words_of(9), needed, starts, sides=(1, 3), side=side)
    monkeypatch.setattr(blocks, "_AT_ONCE", 4)
    monkeypatch.setattr(blocks, "_WORDS_AT_ONCE", 256)
    assert (cover(_words_of(9), needed, starts, sides=(1, 3), side=side) == covered).all()
    assert cover(_words_of(9), needed[:0], starts[:0], sides=(1, 3), side=side).shape == (0, side, side)
