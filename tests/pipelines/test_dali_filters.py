"""Colours, blur and solarisation against the reference in numpy; corrupted twins beside clean views."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from maestri.pipelines.colour import ColourConfig, colour_map
from maestri.pipelines.corruption import CorruptionConfig, corrupt
from maestri.pipelines.dali import DaliExecutor
from maestri.pipelines.executor import ExecutorOptions, PlannedBatch, group_shapes
from maestri.pipelines.filters import BlurConfig, blur_kernel
from maestri.pipelines.reader import CheckedReader
from maestri.pipelines.views import GLOBAL, LOCAL, GroupPlan, LocalConfig, ViewsConfig, plan_views

KINDS = pytest.mark.parametrize("kind", ["4:4:4", "4:2:0"])
_COLOUR = ColourConfig(brightness=0.8, contrast=0.8, saturation=0.9, hue=0.5, probability=0.8, grey=0.3)


class _OneBatch:
    """A source of one batch."""

    def __init__(self, planned: PlannedBatch) -> None:
        self._planned = planned

    def plan(self, index: int) -> PlannedBatch | None:
        return self._planned if index == 0 else None

    def replace(self, planned, bad):
        raise AssertionError(f"{bad} should be good")


def _views(shard_set, config: ViewsConfig) -> tuple[dict[str, GroupPlan], dict[str, torch.Tensor]]:
    """Returns the plan of all samples, and their views."""
    positions = np.arange(len(shard_set))
    samples = CheckedReader(shard_set, num_rows=len(shard_set), max_bad=0).read(positions)
    plan = plan_views(config, seed=3, positions=positions, widths=samples.widths, heights=samples.heights, patch=16)
    options = ExecutorOptions(
        shapes=group_shapes(config),
        batch_size=len(shard_set),
        device=torch.device("cpu"),
        interpolation=config.interpolation,
        antialias=config.antialias,
        num_threads=1,
        prefetch=2,
    )
    executor = DaliExecutor(_OneBatch(PlannedBatch(samples=samples, plan=plan, position=0)), options)
    ((_, views),) = executor
    return dict(plan.groups), views


def _pixels(views: torch.Tensor) -> np.ndarray:
    """Returns views as floats ``view batch height width 3``."""
    return views.permute(0, 1, 3, 4, 2).numpy().astype(float)


def _blurred(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Returns an image ``height width 3`` blurred along one axis after the other, its border mirrored (reflect-101)."""
    kernel = blur_kernel(sigma)
    half = len(kernel) // 2
    for axis in (0, 1):
        padding = [(half, half) if axis == other else (0, 0) for other in range(3)]
        padded = np.pad(pixels, padding, "reflect")
        size = pixels.shape[axis]
        pixels = sum(weight * padded.take(range(at, at + size), axis) for at, weight in enumerate(kernel))
    return np.rint(pixels)


@KINDS
def test_colours__equal_the_reference(make_photos: Callable, kind: str) -> None:
    """Also at the ends of the range, where values are cut off at 0 and 255."""
    shard_set = make_photos(12, kind=kind)
    _, before = _views(shard_set, ViewsConfig(size=48))
    groups, after = _views(shard_set, ViewsConfig(size=48, colour=_COLOUR))
    plain, changed, factors = _pixels(before[GLOBAL]), _pixels(after[GLOBAL]), groups[GLOBAL].colour
    assert factors is not None
    greys = 0
    for view, sample in np.ndindex(2, 12):
        matrix, offset = colour_map(factors[view, sample])
        expected = np.clip(plain[view, sample] @ matrix.T + offset, 0, 255)
        assert np.abs(changed[view, sample] - expected).max() <= 1
        if factors[view, sample, 2] == 0:
            greys += 1
            assert np.ptp(changed[view, sample], axis=-1).max() <= 2
        if factors[view, sample].tolist() == [1, 1, 1, 0]:
            assert np.array_equal(changed[view, sample], plain[view, sample])
    assert greys >= 3
    assert np.abs(plain - changed).mean() > 20


@KINDS
@pytest.mark.parametrize("sigma", [(0.1, 2.0), (0.01, 0.02), (6.0, 20.0)])
@pytest.mark.parametrize("colour", [ColourConfig(), _COLOUR])
def test_blur__equals_the_reference(make_photos: Callable, kind: str, sigma: tuple, colour: ColourConfig) -> None:
    """After colours; views that aren't blurred stay bit-equal.  The window may be wider than the view."""
    shard_set = make_photos(12, kind=kind, smallest=200)
    local = LocalConfig(count=2, size=48, blur=(0.0, 1.0))
    _, before = _views(shard_set, ViewsConfig(size=80, colour=colour, local=local))
    blur = BlurConfig(probability=(0.9, 0.2), sigma=sigma)
    groups, after = _views(shard_set, ViewsConfig(size=80, colour=colour, local=local, blur=blur))
    _, unblurred_locals = _views(shard_set, ViewsConfig(size=80, colour=colour, local=LocalConfig(count=2, size=48)))
    for name, clean in ((GLOBAL, before[GLOBAL]), (LOCAL, unblurred_locals[LOCAL])):
        sigmas = groups[name].blur
        assert sigmas is not None
        assert 0 < (sigmas == 0).sum() < sigmas.size
        for at in np.ndindex(sigmas.shape):
            plain, changed = _pixels(clean)[at], _pixels(after[name])[at]
            if sigmas[at] == 0:
                assert np.array_equal(changed, plain)
            else:
                assert np.abs(changed - _blurred(plain, float(sigmas[at]))).max() <= 1


@KINDS
@pytest.mark.parametrize("blur", [BlurConfig(), BlurConfig(probability=(1.0, 0.1))])
def test_solarise__inverts_the_light_half(make_photos: Callable, kind: str, blur: BlurConfig) -> None:
    """After colours and blur, exactly."""
    shard_set = make_photos(16, kind=kind)
    _, before = _views(shard_set, ViewsConfig(size=48, colour=_COLOUR, blur=blur))
    groups, after = _views(shard_set, ViewsConfig(size=48, colour=_COLOUR, blur=blur, solarise=(0.0, 0.5)))
    chosen = groups[GLOBAL].solarise
    assert chosen is not None
    assert not chosen[0].any()
    assert 0 < chosen[1].sum() < 16
    plain = _pixels(before[GLOBAL])
    inverted = np.where(plain >= 128, 255 - plain, plain)
    assert np.array_equal(_pixels(after[GLOBAL]), np.where(chosen[..., None, None, None], inverted, plain))


@pytest.mark.parametrize("count", [1, 2])
def test_corruption__makes_a_twin_beside_the_clean_views(make_photos: Callable, count: int) -> None:
    shard_set = make_photos(8)
    local = LocalConfig(count=2, size=32)
    _, clean = _views(shard_set, ViewsConfig(size=64, count=count, local=local))
    corruption = CorruptionConfig(coverage=0.6, other=0.4, noise=0.3)
    groups, views = _views(shard_set, ViewsConfig(size=64, count=count, local=local, corruption=corruption))
    assert list(views) == [GLOBAL, LOCAL, "global_corrupted"]
    assert torch.equal(views[GLOBAL], clean[GLOBAL])
    assert torch.equal(views[LOCAL], clean[LOCAL])
    plan = groups[GLOBAL].corruption
    assert plan is not None
    twin = views["global_corrupted"]
    assert torch.equal(twin, corrupt(views[GLOBAL], plan, groups[GLOBAL].token_mask))
    assert twin.shape == views[GLOBAL].shape
    assert not torch.equal(twin, views[GLOBAL])
