"""Corruption: how much is covered and where, what fills it, and that both ways of doing it give the same bytes."""

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from maestri.pipelines import corruption
from maestri.pipelines.corruption import (
    NOISE,
    OTHER,
    ZEROS,
    CorruptionConfig,
    CorruptionPlan,
    corrupt,
    corrupt_into,
    plan_corruption,
)

_VIEWS = np.arange(2)[:, None]
_PATCH = 4


def _planned(
    config: CorruptionConfig, *, grid: int = 14, samples: int = 50, seed: int = 7
) -> tuple[NDArray[np.bool_], CorruptionPlan]:
    return plan_corruption(config, seed=seed, positions=np.arange(samples), views=_VIEWS, grid=grid, patch=_PATCH)


def _shares(token_mask: NDArray[np.bool_], plan: CorruptionPlan) -> NDArray[np.float64]:
    """Returns how much of each view is covered, ``view batch``."""
    return token_mask.mean(axis=-1) if plan.pixels is None else plan.pixels.mean(axis=(-2, -1))


@settings(deadline=None, max_examples=60)
@given(
    grid=st.integers(1, 18),
    coverage=st.floats(0.001, 0.999),
    other_coverage=st.floats(0.001, 0.999),
    sides=st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)),
    align=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_plan_corruption__coverage_within_a_block(
    grid: int, coverage: float, other_coverage: float, sides: tuple[float, float], align: bool, seed: int
) -> None:
    block = (min(sides), max(sides))
    config = CorruptionConfig(
        coverage=coverage, other_coverage=other_coverage, block=block, align=align, other=0.4, noise=0.3
    )
    token_mask, plan = _planned(config, grid=grid, samples=3, seed=seed)
    side = grid if align else grid * _PATCH
    needed = np.where(plan.fill == OTHER, other_coverage, coverage) * side * side
    covered = _shares(token_mask, plan) * side * side
    largest = max(int(block[1] * side + 1e-9), int(np.ceil(block[0] * side - 1e-9)), 1)
    assert (covered >= needed - 1e-6).all()
    assert (covered < needed + largest * largest + 1e-6).all()


def test_plan_corruption__blocks_are_rectangles_within_the_sides() -> None:
    # So little is to be covered that the first block is enough.
    config = CorruptionConfig(coverage=0.001, other_coverage=0.001, block=(0.2, 0.5), align=False)
    _, plan = _planned(config, samples=1000)
    assert plan.pixels is not None
    pixels = plan.pixels.reshape(-1, 56, 56)
    rows, columns = pixels.any(axis=2), pixels.any(axis=1)
    assert (pixels == rows[:, :, None] & columns[:, None, :]).all()
    for along in (rows, columns):
        lengths = along.sum(axis=1)
        assert np.bincount(lengths).nonzero()[0].tolist() == list(range(12, 29))  # 0.2 · 56 = 11.2; 0.5 · 56 = 28
        assert abs(lengths.mean() - 20) < 0.6
        # Placed uniformly: as much room before it as behind it, and each edge is reached.
        before, behind = along.argmax(axis=1), along[:, ::-1].argmax(axis=1)
        assert (before + lengths + behind == 56).all()
        assert abs((before - behind).mean()) < 2
        assert before.min() == behind.min() == 0


def test_plan_corruption__aligned_blocks_of_the_paper() -> None:
    config = CorruptionConfig(coverage=0.001, other_coverage=0.001, block=(0.05, 0.3))
    token_mask, plan = _planned(config, samples=1000)
    assert plan.pixels is None
    heights = token_mask.reshape(-1, 14, 14).any(axis=2).sum(axis=1)
    assert np.bincount(heights).nonzero()[0].tolist() == [1, 2, 3, 4]  # 0.7 to 4.2 tokens


@pytest.mark.parametrize("align", [True, False])
def test_plan_corruption__tokens_with_a_corrupted_pixel(align: bool) -> None:
    token_mask, plan = _planned(CorruptionConfig(coverage=0.3, align=align))
    assert token_mask.shape == (2, 50, 196)
    assert token_mask.dtype == np.bool_
    if align:
        assert plan.pixels is None
        return
    assert plan.pixels is not None
    assert plan.pixels.shape == (2, 50, 56, 56)
    by_token = plan.pixels.reshape(2, 50, 14, _PATCH, 14, _PATCH)
    assert (by_token.any(axis=(3, 5)).reshape(2, 50, 196) == token_mask).all()
    assert not (by_token.all(axis=(3, 5)).reshape(2, 50, 196) == token_mask).all()


@pytest.mark.parametrize("align", [True, False])
def test_plan_corruption__each_position_and_view_alone(align: bool) -> None:
    config = CorruptionConfig(coverage=0.5, noise=0.3, align=align)
    positions = np.array([0, 1, 5, (1 << 40) + 1])
    options: dict[str, Any] = {"grid": 7, "patch": _PATCH}
    token_mask, plan = plan_corruption(config, seed=3, positions=positions, views=_VIEWS, **options)
    for view, sample in np.ndindex(2, 4):
        only = positions[[sample]]
        alone_mask, alone = plan_corruption(config, seed=3, positions=only, views=_VIEWS[[view]], **options)
        assert (alone_mask[0, 0] == token_mask[view, sample]).all()
        assert alone.fill[0, 0] == plan.fill[view, sample]
        assert alone.noise_start[0, 0] == plan.noise_start[view, sample]
        if plan.pixels is not None and alone.pixels is not None:
            assert (alone.pixels[0, 0] == plan.pixels[view, sample]).all()


def test_plan_corruption__golden() -> None:
    token_mask, plan = plan_corruption(
        CorruptionConfig(coverage=0.5, noise=0.2), seed=7, positions=np.arange(50), views=_VIEWS, grid=14, patch=16
    )
    assert plan.fill[1, :10].tolist() == [1, 1, 2, 1, 0, 2, 2, 0, 0, 0]
    assert plan.noise_start[0, :3].tolist() == [1024935, 502025, 855980]
    assert _digest(token_mask) == "2a42d9704717b347"
    token_mask, plan = _planned(CorruptionConfig(coverage=0.5, noise=0.2, align=False), grid=7)
    assert plan.pixels is not None
    assert (_digest(token_mask), _digest(plan.pixels)) == ("7a7f62d7a8c8176a", "da3e8569c50805f6")


def _digest(mask: NDArray[np.bool_]) -> str:
    return hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:16]


def test_plan_corruption__probabilities_of_fills() -> None:
    _, plan = _planned(CorruptionConfig(coverage=0.1, other=0.5, noise=0.3), samples=4000)
    shares = np.bincount(plan.fill.ravel(), minlength=3) / plan.fill.size
    assert np.abs(shares - (0.2, 0.3, 0.5)).max() < 0.03
    for other, noise, only in ((0.0, 0.0, ZEROS), (0.0, 1.0, NOISE), (1.0, 0.0, OTHER)):
        _, plan = _planned(CorruptionConfig(coverage=0.1, other=other, noise=noise))
        assert (plan.fill == only).all()


def test_plan_corruption__too_large_for_the_noise() -> None:
    options: dict[str, Any] = {"seed": 1, "positions": np.arange(2), "views": _VIEWS, "grid": 33, "patch": 32}
    with pytest.raises(ValueError, match=r"views\.size is 1056 with noise; expected at most 1024 pixels"):
        plan_corruption(CorruptionConfig(coverage=0.5, noise=0.1), **options)
    plan_corruption(CorruptionConfig(coverage=0.5), **options)


def _clean(samples: int, size: int) -> NDArray[np.uint8]:
    """Returns clean views, uint8 ``view batch height width 3``; none has a black pixel."""
    return np.random.default_rng(0).integers(1, 256, (2, samples, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("align", [True, False])
def test_corrupt__what_is_where(align: bool) -> None:
    config = CorruptionConfig(coverage=0.5, other=0.4, noise=0.3, align=align)
    token_mask, plan = _planned(config, grid=7)
    clean = _clean(50, 28)
    before = clean.copy()
    views = torch.from_numpy(clean).permute(0, 1, 4, 2, 3)
    twin = corrupt(views, plan, token_mask)
    assert (clean == before).all()
    assert twin.shape == views.shape
    assert twin.stride() == views.stride()
    assert twin.dtype == torch.uint8
    pixels = plan.pixels
    if pixels is None:
        pixels = token_mask.reshape(2, 50, 7, 7).repeat(_PATCH, axis=2).repeat(_PATCH, axis=3)
    corrupted = twin.permute(0, 1, 3, 4, 2).numpy()
    assert (corrupted[~pixels] == clean[~pixels]).all()
    bank = corruption._noise()
    for view, sample in np.ndindex(2, 50):
        chosen, start = pixels[view, sample], plan.noise_start[view, sample]
        filled = {
            ZEROS: np.zeros_like(clean[0, 0]),
            NOISE: bank[start : start + 28 * 28 * 3].reshape(28, 28, 3),
            OTHER: clean[view, sample + 1 if sample % 2 == 0 else sample - 1],
        }[int(plan.fill[view, sample])]
        assert (corrupted[view, sample][chosen] == filled[chosen]).all()


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize(("other", "noise"), [(0.4, 0.3), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize(("grid", "patch"), [(7, 4), (6, 16), (5, 7), (2, 3)])
def test_corrupt__all_ways_same_bytes(align: bool, other: float, noise: float, grid: int, patch: int) -> None:
    config = CorruptionConfig(coverage=0.5, other=other, noise=noise, align=align)
    token_mask, plan = plan_corruption(config, seed=2, positions=np.arange(12), views=_VIEWS, grid=grid, patch=patch)
    clean = _clean(12, grid * patch)
    nhwc = torch.from_numpy(clean)
    at_once = corruption._corrupt_at_once(nhwc, plan, token_mask)  # what runs on a GPU
    assert (torch.from_numpy(clean) == nhwc).all()
    twin = corrupt(nhwc.permute(0, 1, 4, 2, 3), plan, token_mask)
    assert torch.equal(at_once, twin.permute(0, 1, 3, 4, 2))
    out = np.empty_like(clean)
    for view, sample in np.ndindex(2, 12):
        partner = clean[view, sample ^ 1] if plan.fill[view, sample] == OTHER else None
        corrupt_into(out[view, sample], clean[view, sample], partner, plan, token_mask, view=view, sample=sample)
    assert (out == at_once.numpy()).all()


def test_corrupt__odd_batch() -> None:
    token_mask, plan = _planned(CorruptionConfig(coverage=0.5, other=1.0), grid=7, samples=3)
    clean = _clean(3, 28)
    with pytest.raises(ValueError, match="a batch has 3 samples; expected an even number"):
        corrupt(torch.from_numpy(clean).permute(0, 1, 4, 2, 3), plan, token_mask)
    with pytest.raises(ValueError, match="sample 2 of the batch has no partner"):
        corrupt_into(np.empty_like(clean[0, 2]), clean[0, 2], None, plan, token_mask, view=0, sample=2)


def test_noise__uniform_and_of_its_own_for_each_view() -> None:
    bank = corruption._noise()
    assert bank.size == (1 << 20) + 3 * 1024 * 1024
    counts = np.bincount(bank, minlength=256) / (bank.size / 256)
    assert np.abs(counts - 1).max() < 0.05  # 6 standard deviations
    assert abs(np.corrcoef(bank[1:], bank[:-1])[0, 1]) < 0.003
    assert hashlib.sha256(bank.tobytes()).hexdigest()[:16] == "76494587a3bc61f1"
    token_mask, plan = _planned(CorruptionConfig(coverage=0.9, other=0.0, noise=1.0), grid=7)
    assert len(np.unique(plan.noise_start)) == plan.noise_start.size
    assert plan.noise_start.min() < 1 << 15
    assert plan.noise_start.max() > (1 << 20) - (1 << 15)
    twin = corrupt(torch.zeros(2, 50, 28, 28, 3, dtype=torch.uint8).permute(0, 1, 4, 2, 3), plan, token_mask)
    # Of views that are corrupted nearly everywhere, no two look alike anywhere: 1 / 256 of the levels agree by chance.
    levels = twin.reshape(100, -1)
    agree = (levels[0] == levels[1:]) & (levels[0] > 0)
    assert agree.float().mean(dim=1).max() < 0.02


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("coverage", {"coverage": 1.0}),
        ("coverage", {"coverage": -0.1}),
        ("block", {"block": (0.0, 0.3)}),
        ("block", {"block": (0.3, 0.2)}),
        ("block", {"block": (0.3, 1.2)}),
        ("other", {"other": 1.1}),
        ("other_coverage", {"other_coverage": 0.0}),
        ("noise", {"noise": -0.1}),
        ("noise", {"noise": 0.6, "other": 0.5}),
    ],
)
def test_corruption_config__names_the_field(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"views\.corruption\.{field} is "):
        CorruptionConfig(**values)
