"""Every view against Pillow and torchvision; hand-over."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from maestri.pipelines.dali import DaliExecutor
from maestri.pipelines.executor import ExecutorOptions, PlannedBatch, group_shapes
from maestri.pipelines.reader import CheckedReader, Samples
from maestri.pipelines.views import GLOBAL, LOCAL, LocalConfig, ViewsConfig, plan_center, plan_views

_MODES = {"linear": InterpolationMode.BILINEAR, "cubic": InterpolationMode.BICUBIC}
_CPU = torch.device("cpu")


class _Source:
    """Batches that a function returns by their number; nothing is replaced."""

    def __init__(self, plan: Callable[[int], PlannedBatch | None]) -> None:
        self.plan = plan

    def replace(self, planned, bad):
        raise AssertionError(f"{bad} should be good")


def _planned(shard_set, rows, config: ViewsConfig, patch: int = 4, position: int = 0) -> PlannedBatch:
    samples = CheckedReader(shard_set, num_rows=len(shard_set), max_bad=0).read(rows)
    positions = np.arange(position, position + len(rows))
    plan = plan_views(config, seed=3, positions=positions, widths=samples.widths, heights=samples.heights, patch=patch)
    return PlannedBatch(samples=samples, plan=plan, position=position)


def _executor(
    plan: Callable[[int], PlannedBatch | None], config: ViewsConfig, batch_size: int, **options
) -> DaliExecutor:
    settings = {"num_threads": 1, "prefetch": 2, "device": _CPU} | options
    return DaliExecutor(
        _Source(plan),
        ExecutorOptions(
            shapes=group_shapes(config),
            batch_size=batch_size,
            interpolation=config.interpolation,
            antialias=config.antialias,
            **settings,
        ),
    )


def _views(planned: PlannedBatch, config: ViewsConfig) -> dict[str, torch.Tensor]:
    """Returns the views of one batch."""
    executor = _executor(lambda index: planned if index == 0 else None, config, len(planned.samples.rows))
    ((_, views),) = executor
    executor.close()
    return views


def _decoded(encoded: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(encoded)).convert("RGB"))).permute(2, 0, 1)


def _reference(encoded: bytes, window, flip: bool, config: ViewsConfig, size: int) -> np.ndarray:
    """Returns Pillow's decoding, cut, resized and flipped by torchvision v2 on uint8."""
    top, left, height, width = (int(value) for value in window)
    view = functional.resized_crop(
        _decoded(encoded),
        top,
        left,
        height,
        width,
        [size, size],
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
    views = _views(planned, config)
    group = planned.plan.groups[GLOBAL]
    assert views[GLOBAL].shape == (2, 12, 3, size, size)
    assert views[GLOBAL].dtype == torch.uint8
    means, largest_difference = [], 0
    for view, sample in np.ndindex(2, 12):
        reference = _reference(
            shard_set.encoded[sample], group.windows[view, sample], bool(group.flip[view, sample]), config, size
        )
        difference = np.abs(views[GLOBAL][view, sample].numpy().astype(int) - reference)
        means.append(difference.mean())
        largest_difference = max(largest_difference, int(difference.max()))
    print(f"{kind} {interpolation} {size}: mean {np.mean(means):.3f}, worst {max(means):.3f}, max {largest_difference}")
    assert group.flip.any()
    assert not group.flip.all()
    assert np.mean(means) <= 0.5
    assert largest_difference <= 40


@pytest.mark.parametrize("kind", ["4:4:4", "4:2:0"])
def test_views__groups_of_two_sizes_equal_torchvision(make_photos: Callable, kind: str) -> None:
    shard_set = make_photos(6, kind=kind, smallest=100)
    config = ViewsConfig(size=224, local=LocalConfig(count=8, size=96))
    planned = _planned(shard_set, np.arange(6), config)
    views = _views(planned, config)
    assert list(views) == [GLOBAL, LOCAL]
    for name, count, size in ((GLOBAL, 2, 224), (LOCAL, 8, 96)):
        assert views[name].shape == (count, 6, 3, size, size)
        assert views[name][0].is_contiguous(memory_format=torch.channels_last)
        group = planned.plan.groups[name]
        for view, sample in np.ndindex(count, 6):
            window, flip = group.windows[view, sample], bool(group.flip[view, sample])
            reference = _reference(shard_set.encoded[sample], window, flip, config, size)
            difference = np.abs(views[name][view, sample].numpy().astype(int) - reference)
            assert difference.mean() <= 0.5
            assert difference.max() <= 40


@pytest.mark.parametrize("options", [{"subsampling": "4:4:4"}, {"subsampling": "4:2:0"}, {"progressive": True}])
@pytest.mark.parametrize("grey", [False, True])
def test_views__only_one_is_decoded_alone_with_the_same_pixels(options: dict, grey: bool) -> None:
    """Two small views are cut out of the whole image, one is decoded by itself; the first is planned the same."""
    rng = np.random.default_rng(1)
    encoded, sizes = [], rng.integers(20, 500, (24, 2))
    for width, height in sizes.tolist():
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        exif = Image.Exif()
        exif[274] = int(rng.integers(1, 9))  # an orientation, which nobody heeds
        buffer = io.BytesIO()
        (image.convert("L") if grey else image).save(buffer, "JPEG", quality=90, exif=exif, **options)
        encoded.append(np.frombuffer(buffer.getvalue(), np.uint8))
    samples = Samples(rows=np.arange(24), encoded=encoded, widths=sizes[:, 0], heights=sizes[:, 1])
    found = []
    for count in (1, 2):
        config = ViewsConfig(size=60, count=count, scale=(0.05, 1.0))
        plan = plan_views(
            config, seed=0, positions=np.arange(24), widths=samples.widths, heights=samples.heights, patch=4
        )
        found.append(_views(PlannedBatch(samples=samples, plan=plan, position=0), config)[GLOBAL][0])
    assert torch.equal(*found)


def test_views__center_crop_equals_resize_then_crop(make_photos: Callable) -> None:
    shard_set = make_photos(8, smallest=200, largest=400)
    samples = CheckedReader(shard_set, num_rows=8, max_bad=0).read(np.arange(8))
    plan = plan_center(112, crop_fraction=0.875, widths=samples.widths, heights=samples.heights)
    planned = PlannedBatch(samples=samples, plan=plan, position=0)
    views = _views(planned, ViewsConfig(count=1, size=112))
    for sample, encoded in enumerate(shard_set.encoded):
        top, left, height, width = plan.groups[GLOBAL].windows[0, sample].tolist()
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        box = (left, top, left + width, top + height)
        reference = np.asarray(image.resize((112, 112), Image.Resampling.BICUBIC, box=box)).astype(int)
        got = views[GLOBAL][0, sample].permute(1, 2, 0).numpy()
        assert np.abs(got - reference).mean() <= 0.5


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
        assert _views(planned, views)[GLOBAL].shape == (views.count, 4, 3, 32, 32)
