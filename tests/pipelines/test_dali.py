"""Every view against Pillow and torchvision; errors; hand-over."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from maestri.pipelines.colour import ColourConfig, colour_map
from maestri.pipelines.dali import DaliExecutor, GroupShape, PlannedBatch
from maestri.pipelines.reader import CheckedReader, Samples
from maestri.pipelines.views import GLOBAL, ViewsConfig, plan_center, plan_views

_MODES = {"linear": InterpolationMode.BILINEAR, "cubic": InterpolationMode.BICUBIC}
_CPU = torch.device("cpu")


def _planned(shard_set, rows, config: ViewsConfig, patch: int = 4, position: int = 0) -> PlannedBatch:
    samples = CheckedReader(shard_set, num_rows=len(shard_set), max_bad=0).read(rows)
    positions = np.arange(position, position + len(rows))
    plan = plan_views(config, seed=3, positions=positions, widths=samples.widths, heights=samples.heights, patch=patch)
    return PlannedBatch(samples=samples, plan=plan, position=position)


def _executor(source, config: ViewsConfig, batch_size: int, **options) -> DaliExecutor:
    settings = {"num_threads": 1, "prefetch": 2, "device": _CPU} | options
    return DaliExecutor(
        source,
        shapes={GLOBAL: GroupShape(count=config.count, size=config.size, has_colour=config.colour.changes)},
        batch_size=batch_size,
        interpolation=config.interpolation,
        antialias=config.antialias,
        **settings,
    )


def _decoded(encoded: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(encoded)).convert("RGB"))).permute(2, 0, 1)


def _reference(encoded: bytes, window, flip: bool, config: ViewsConfig) -> np.ndarray:
    """Returns Pillow's decoding, cut, resized and flipped by torchvision v2 on uint8."""
    top, left, height, width = (int(value) for value in window)
    view = functional.resized_crop(
        _decoded(encoded),
        top,
        left,
        height,
        width,
        [config.size, config.size],
        interpolation=_MODES[config.interpolation],
        antialias=config.antialias,
    )
    return (functional.hflip(view) if flip else view).numpy().astype(int)


# (kind, interpolation, antialias, smallest, largest, view size) → bounds on the mean and the largest difference, levels
# of 255.  The large single differences are in the outermost pixels, where DALI repeats the edge and torchvision
# renormalises the filter.
@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("kind", ["4:4:4", "4:2:0", "grey"])
@pytest.mark.parametrize(("smallest", "largest", "size"), [(60, 400, 96), (300, 500, 224), (28, 29, 28)])
def test_views__equal_torchvision(
    make_photos: Callable, kind: str, interpolation: str, smallest: int, largest: int, size: int
) -> None:
    shard_set = make_photos(12, kind=kind, smallest=smallest, largest=largest)
    config = ViewsConfig(size=size, interpolation=interpolation)
    planned = _planned(shard_set, np.arange(12), config)
    executor = _executor(lambda index: planned if index == 0 else None, config, 12)
    _, views = next(executor)
    group = planned.plan.groups[GLOBAL]
    assert views[GLOBAL].shape == (2, 12, 3, size, size)
    assert views[GLOBAL].dtype == torch.uint8
    means, largest_difference = [], 0
    for view, sample in np.ndindex(2, 12):
        reference = _reference(
            shard_set.encoded[sample], group.windows[view, sample], bool(group.flip[view, sample]), config
        )
        difference = np.abs(views[GLOBAL][view, sample].numpy().astype(int) - reference)
        means.append(difference.mean())
        largest_difference = max(largest_difference, int(difference.max()))
    print(f"{kind} {interpolation} {size}: mean {np.mean(means):.3f}, worst {max(means):.3f}, max {largest_difference}")
    assert group.flip.any()
    assert not group.flip.all()
    assert np.mean(means) <= 0.5
    assert largest_difference <= 40
    executor.close()


def test_views__center_crop_equals_resize_then_crop(make_photos: Callable) -> None:
    shard_set = make_photos(8, smallest=200, largest=400)
    samples = CheckedReader(shard_set, num_rows=8, max_bad=0).read(np.arange(8))
    plan = plan_center(112, crop_fraction=0.875, widths=samples.widths, heights=samples.heights)
    planned = PlannedBatch(samples=samples, plan=plan, position=0)
    config = ViewsConfig(count=1, size=112)
    executor = _executor(lambda index: planned if index == 0 else None, config, 8)
    _, views = next(executor)
    for sample, encoded in enumerate(shard_set.encoded):
        top, left, height, width = plan.groups[GLOBAL].windows[0, sample].tolist()
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        box = (left, top, left + width, top + height)
        reference = np.asarray(image.resize((112, 112), Image.Resampling.BICUBIC, box=box)).astype(int)
        got = views[GLOBAL][0, sample].permute(1, 2, 0).numpy()
        assert np.abs(got - reference).mean() <= 0.5
    executor.close()


def test_executor__short_batches_then_stop(tiny_greys) -> None:
    config = ViewsConfig(size=28)
    sizes = [8, 8, 3]
    batches = [_planned(tiny_greys, np.arange(size), config, position=size) for size in sizes]
    executor = _executor(lambda index: batches[index] if index < 3 else None, config, 8)
    results = list(executor)
    assert [views[GLOBAL].shape[1] for _, views in results] == sizes
    assert [planned.position for planned, _ in results] == sizes
    executor.close()
    executor.close()
    assert list(executor) == []


@pytest.mark.parametrize("count", [1, 2])
def test_executor__views_outlive_it(tiny_greys, count: int) -> None:
    config = ViewsConfig(size=28, count=count)
    batches = [_planned(tiny_greys, np.arange(8) + index, config, position=8 * index) for index in range(12)]
    executor = _executor(lambda index: batches[index % 12], config, 8)
    kept = [next(executor)[1][GLOBAL] for _ in range(12)]
    copies = [views.clone() for views in kept]
    for _ in range(24):
        next(executor)
    executor.close()
    del executor
    assert all(torch.equal(views, copy) for views, copy in zip(kept, copies, strict=True))
    assert kept[0][0].is_contiguous(memory_format=torch.channels_last)


def test_executor__error_comes_after_the_last_good_batch(tiny_greys) -> None:
    config = ViewsConfig(size=28)
    planned = _planned(tiny_greys, np.arange(8), config)

    def source(index: int) -> PlannedBatch:
        if index == 3:
            raise KeyError("the storage is gone")
        return planned

    executor = _executor(source, config, 8, prefetch=3)
    for _ in range(3):
        next(executor)
    for _ in range(2):
        with pytest.raises(KeyError, match="storage is gone"):
            next(executor)
    executor.close()


def test_executor__runs_ahead(tiny_greys) -> None:
    config = ViewsConfig(size=28)
    planned = _planned(tiny_greys, np.arange(8), config)
    asked = []

    def source(index: int) -> PlannedBatch:
        asked.append(index)
        return planned

    executor = _executor(source, config, 8, prefetch=3)
    next(executor)
    assert max(asked) >= 2
    executor.close()


def test_executor__undecodable_body_is_one_clear_error(tiny_greys) -> None:
    config = ViewsConfig(size=28)
    planned = _planned(tiny_greys, np.arange(8), config)
    body = planned.samples.encoded[2]
    planned.samples.encoded[2] = body[: len(body) // 2]
    executor = _executor(lambda index: planned, config, 8)
    with pytest.raises(RuntimeError, match=r"DALI failed on the batch of rows \[0, 1, 2, 3, 4, 5, 6, 7\]"):
        next(executor)
    with pytest.raises(RuntimeError, match="DALI failed"):  # and it stays so: never a silent end
        next(executor)
    executor.close()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (500, 33), (2600, 40), (3, 2)])
def test_views__odd_shapes(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=100, subsampling="4:4:4")
    samples = Samples(
        rows=np.arange(4),
        encoded=[np.frombuffer(buffer.getvalue(), np.uint8)] * 4,
        widths=np.full(4, size[0]),
        heights=np.full(4, size[1]),
    )
    config = ViewsConfig(size=32)
    train = plan_views(config, seed=0, positions=np.arange(4), widths=samples.widths, heights=samples.heights, patch=4)
    center = plan_center(32, crop_fraction=0.875, widths=samples.widths, heights=samples.heights)
    for plan, views in ((train, config), (center, ViewsConfig(size=32, count=1))):
        planned = PlannedBatch(samples=samples, plan=plan, position=0)
        executor = _executor(lambda index, planned=planned: planned if index == 0 else None, views, 4)
        _, groups = next(executor)
        assert groups[GLOBAL].shape == (views.count, 4, 3, 32, 32)
        executor.close()


def test_executor__refuses_device(tiny_greys) -> None:
    with pytest.raises(ValueError, match="runs on cpu or cuda"):
        _executor(lambda index: None, ViewsConfig(), 8, device=torch.device("meta"))


def test_executor__changes_colours_as_the_reference(make_photos: Callable) -> None:
    """Also at the ends of the range, where values are cut off at 0 and 255."""
    shard_set = make_photos(6, kind="4:4:4")
    colour = ColourConfig(brightness=0.8, contrast=0.8, saturation=0.9, hue=0.5)
    outputs = []
    for config in (ViewsConfig(size=48), ViewsConfig(size=48, colour=colour)):
        planned = _planned(shard_set, np.arange(6), config)
        executor = _executor(lambda index, planned=planned: planned if index == 0 else None, config, 6)
        outputs.append(next(executor)[1][GLOBAL].permute(0, 1, 3, 4, 2).numpy().astype(float))
    before, after = outputs
    factors = planned.plan.groups[GLOBAL].colour
    assert factors is not None
    for view, sample in np.ndindex(2, 6):
        matrix, offset = colour_map(factors[view, sample])
        expected = np.clip(before[view, sample] @ matrix.T + offset, 0, 255)
        assert np.abs(after[view, sample] - expected).max() <= 1
    assert np.abs(before - after).mean() > 20
