"""Block-wise token masks: exact counts, blocks, nowhere favoured."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from maestri.pipelines import masks
from maestri.pipelines.masks import MaskConfig, num_hidden, plan_masks

_VIEWS = np.arange(2)[:, None]


def _planned(config: MaskConfig, *, grid: int, seed: int = 7, samples: int = 50) -> NDArray[np.bool_]:
    """Returns masks, bool ``mask height width``."""
    planned = plan_masks(config, seed=seed, positions=np.arange(samples), views=_VIEWS, grid=grid)
    return planned.reshape(-1, grid, grid)


def _perimeter(squares: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Returns the length of the border between hidden and visible, ``mask``."""
    padded = np.pad(squares, ((0, 0), (1, 1), (1, 1)))
    return (padded[:, 1:] ^ padded[:, :-1]).sum((1, 2)) + (padded[:, :, 1:] ^ padded[:, :, :-1]).sum((1, 2))


@settings(deadline=None)
@given(
    grid=st.integers(1, 20),
    ratio=st.floats(0, 0.999),
    smallest=st.integers(1, 400),
    aspect=st.floats(0.001, 1),
    seed=st.integers(0, 2**64 - 1),
)
def test_block_masks__exact_count(grid: int, ratio: float, smallest: int, aspect: float, seed: int) -> None:
    config = MaskConfig(kind="block", ratio=ratio, smallest_block=smallest, aspect=aspect)
    planned = _planned(config, grid=grid, seed=seed, samples=6)
    assert planned.dtype == np.bool_
    assert (planned.sum((1, 2)) == num_hidden(ratio, grid * grid)).all()


@pytest.mark.parametrize("grid", [2, 3, 4, 7, 14, 16, 32, 37, 65])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.75, 0.95])
def test_block_masks__exact_count_on_usual_grids(grid: int, ratio: float) -> None:
    planned = _planned(MaskConfig(kind="block", ratio=ratio), grid=grid, samples=20)
    assert (planned.sum((1, 2)) == num_hidden(ratio, grid * grid)).all()


@pytest.mark.parametrize("attempts", [0, 4, 16])
def test_block_masks__what_attempts_leave_grows(attempts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_ATTEMPTS", attempts)
    planned = _planned(MaskConfig(kind="block", ratio=0.9, smallest_block=1), grid=14)
    assert (planned.sum((1, 2)) == 176).all()
    assert _perimeter(planned).mean() < 100


@pytest.mark.parametrize(("grid", "ratio", "most"), [(14, 0.3, 0.3), (14, 0.5, 0.3), (14, 0.75, 0.4), (7, 0.5, 0.5)])
def test_block_masks__border_is_a_fraction_of_random_masks(grid: int, ratio: float, most: float) -> None:
    block, random = (
        _planned(MaskConfig(kind=kind, ratio=ratio), grid=grid, samples=500) for kind in ("block", "random")
    )
    assert _perimeter(block).mean() < most * _perimeter(random).mean()
    padded = np.pad(block, ((0, 0), (1, 1), (1, 1)))
    near = padded[:, :-2, 1:-1] | padded[:, 2:, 1:-1] | padded[:, 1:-1, :-2] | padded[:, 1:-1, 2:]
    assert (block & ~near).sum((1, 2)).mean() < 0.1  # lone tokens of a mask


def test_block_masks__all_sides_alike() -> None:
    hidden = _planned(MaskConfig(kind="block", ratio=0.4), grid=14, samples=4000).mean(axis=0)
    assert np.abs(hidden - hidden[::-1]).max() < 0.035
    assert np.abs(hidden - hidden[:, ::-1]).max() < 0.035
    assert np.abs(hidden - hidden.T).max() < 0.035


def test_block_masks__one_block_is_a_rectangle_within_the_aspect() -> None:
    # A block is as large as all that is to be hidden, so the first that fits is the only one, but for rounding.
    planned = _planned(MaskConfig(kind="block", ratio=0.25, smallest_block=49, aspect=0.3), grid=14, samples=300)
    heights, widths = planned.any(axis=2).sum(axis=1), planned.any(axis=1).sum(axis=1)
    whole = planned.sum((1, 2)) > 0.8 * heights * widths
    assert whole.mean() > 0.5
    assert 3.5 <= heights[whole].min() <= 5
    assert 11 <= heights[whole].max() <= 14
    assert abs(np.log(heights / widths)[whole].mean()) < 0.15


def test_block_masks__no_samples() -> None:
    planned = plan_masks(MaskConfig(kind="block"), seed=1, positions=np.arange(0), views=_VIEWS, grid=7)
    assert planned.shape == (2, 0, 49)


def test_block_masks__golden() -> None:
    planned = _planned(MaskConfig(kind="block", ratio=0.5), grid=14).reshape(2, 50, 14, 14)
    rows = ["".join(".#"[int(hidden)] for hidden in row) for row in planned[1, 3]]
    assert rows[:6] == [
        ".#####........",
        ".######.......",
        ".######.......",
        ".############.",
        ".############.",
        "...##########.",
    ]
    assert hashlib.sha256(np.packbits(planned).tobytes()).hexdigest()[:16] == "2d69d8b36778f7af"
    ibot = _planned(MaskConfig(kind="block", ratio=0.3, spread=0.2, unmasked=0.5), grid=14)
    assert ibot.sum((1, 2))[:10].tolist() == [0, 0, 0, 72, 0, 36, 0, 0, 65, 71]
    assert hashlib.sha256(np.packbits(ibot).tobytes()).hexdigest()[:16] == "9bc106c98886a4f2"
