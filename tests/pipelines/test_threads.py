"""Batches of the ``threads`` executor: pixels, order, replacement of what can't be decoded, errors, threads."""

import _thread
import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from maestri.pipelines.colour import ColourConfig
from maestri.pipelines.corruption import CorruptionConfig, corrupt
from maestri.pipelines.executor import ExecutorOptions, PlannedBatch, executor_class, group_shapes
from maestri.pipelines.filters import BlurConfig
from maestri.pipelines.reader import Samples, TooManyBadSamples
from maestri.pipelines.stages import Stages
from maestri.pipelines.threads import ThreadsExecutor
from maestri.pipelines.views import CORRUPTED, GLOBAL, LOCAL, LocalConfig, ViewsConfig, plan_center, plan_views

SIZE, PATCH = 8, 8
PLAIN = ViewsConfig(size=32)
EVERYTHING = ViewsConfig(
    size=48,
    colour=ColourConfig(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, probability=0.8, grey=0.2),
    blur=BlurConfig(probability=(1.0, 0.1)),
    solarise=(0.0, 0.5),
    corruption=CorruptionConfig(coverage=0.4, noise=0.3),
    local=LocalConfig(count=3, size=24, blur=(0.5,)),
)


class _Source:
    """Batches of rows in order; chosen rows are cut in half, and replaced by the next row."""

    def __init__(
        self, shard_set, config: ViewsConfig, *, sizes: tuple[int, ...] = (SIZE,) * 5, bad: tuple[int, ...] = ()
    ) -> None:
        self.asked: list[int] = []
        self.replaced: list[dict[int, str]] = []
        self.budget = 99
        self.error_at = -1
        self._shard_set, self._config, self._sizes, self._bad = shard_set, config, sizes, bad

    def plan(self, index: int) -> PlannedBatch | None:
        self.asked.append(index)
        if index == self.error_at:
            raise KeyError("the storage is gone")
        if index >= len(self._sizes):
            return None
        first = sum(self._sizes[:index])
        return self._planned(np.arange(first, first + self._sizes[index]), first)

    def replace(self, planned: PlannedBatch, bad: Mapping[int, str]) -> PlannedBatch:
        rows = planned.samples.rows.copy()
        self.replaced.append({int(rows[number]): reason for number, reason in bad.items()})
        if sum(map(len, self.replaced)) > self.budget:
            raise TooManyBadSamples(self.budget + 1, self.budget, "key", "why")
        rows[list(bad)] += 1
        return self._planned(rows, planned.position)

    def _planned(self, rows: np.ndarray, position: int) -> PlannedBatch:
        stored = rows % len(self._shard_set)
        encoded = [np.frombuffer(self._shard_set.encoded[row], np.uint8) for row in stored]
        samples = Samples(
            rows=rows,
            encoded=[
                data[: len(data) // 2] if row in self._bad else data for row, data in zip(rows, encoded, strict=True)
            ],
            widths=self._shard_set.columns.width[stored].astype(np.int64),
            heights=self._shard_set.columns.height[stored].astype(np.int64),
        )
        plan = plan_views(
            self._config,
            seed=3,
            positions=np.arange(position, position + len(rows)),
            widths=samples.widths,
            heights=samples.heights,
            patch=PATCH,
        )
        return PlannedBatch(samples=samples, plan=plan, position=position)


class _One:
    """A source of one given batch."""

    def __init__(self, planned: PlannedBatch) -> None:
        self._planned = planned

    def plan(self, index: int) -> PlannedBatch | None:
        return self._planned if index == 0 else None

    def replace(self, planned: PlannedBatch, bad: Mapping[int, str]) -> PlannedBatch:
        raise AssertionError(f"{bad} should be good")


def _options(config: ViewsConfig, **changes: object) -> ExecutorOptions:
    settings = {"num_threads": 2, "prefetch": 2, "batch_size": SIZE, "device": torch.device("cpu")} | changes
    return ExecutorOptions(
        shapes=group_shapes(config), interpolation=config.interpolation, antialias=config.antialias, **settings
    )


def _executor(source, config: ViewsConfig, **changes: object) -> ThreadsExecutor:
    return ThreadsExecutor(source, _options(config, **changes))


def _num_threads() -> int:
    return sum(thread.name.startswith("maestri-views") for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert _num_threads() == 0


# --------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("interpolation", "mode"), [("linear", "BILINEAR"), ("cubic", "BICUBIC")])
@pytest.mark.parametrize("kind", ["4:4:4", "4:2:0", "grey"])
@pytest.mark.parametrize("shape", [(60, 400, 96), (28, 29, 56)])
def test_views__equal_torchvision(
    make_photos: Callable, kind: str, interpolation: str, mode: str, antialias: bool, shape: tuple[int, int, int]
) -> None:
    """Bit for bit; Pillow decodes."""
    smallest, largest, size = shape
    shard_set = make_photos(12, kind=kind, smallest=smallest, largest=largest)
    local = LocalConfig(count=3, size=32)
    config = ViewsConfig(size=size, interpolation=interpolation, antialias=antialias, local=local)
    ((planned, views),) = _executor(_Source(shard_set, config, sizes=(12,)), config)
    for name, group in planned.plan.groups.items():
        assert views[name].shape == (len(group.windows), 12, 3, group.size, group.size)
        assert views[name].dtype == torch.uint8
        assert group.flip.any() and not group.flip.all()
        for view, sample in np.ndindex(group.flip.shape):
            decoded = np.array(Image.open(io.BytesIO(shard_set.encoded[sample])).convert("RGB"))
            expected = functional.resized_crop(
                torch.from_numpy(decoded).permute(2, 0, 1),
                *group.windows[view, sample].tolist(),
                [group.size] * 2,
                interpolation=InterpolationMode[mode],
                antialias=antialias,
            )
            expected = functional.hflip(expected) if group.flip[view, sample] else expected
            # Without antialias torchvision computes bicubic in float32, so rounding differs.
            most = int(not antialias and interpolation == "cubic")
            assert (views[name][view, sample].int() - expected.int()).abs().max() <= most


@pytest.mark.parametrize("name", ["threads", "dali"])
def test_views__center_crop(make_photos: Callable, name: str) -> None:
    """As Pillow's, by both executors."""
    shard_set = make_photos(8, smallest=200, largest=400)
    config = ViewsConfig(count=1, size=112)
    planned = _Source(shard_set, config).plan(0)
    widths, heights = planned.samples.widths, planned.samples.heights
    planned = replace(planned, plan=plan_center(112, crop_fraction=0.875, widths=widths, heights=heights))
    executor = executor_class(name)(_One(planned), _options(config))
    _, views = next(executor)
    executor.close()
    for sample, encoded in enumerate(shard_set.encoded):
        top, left, height, width = planned.plan.groups[GLOBAL].windows[0, sample].tolist()
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        box = (left, top, left + width, top + height)
        expected = np.asarray(image.resize((112, 112), Image.Resampling.BICUBIC, box=box)).astype(int)
        got = views[GLOBAL][0, sample].permute(1, 2, 0).numpy()
        assert np.abs(got - expected).mean() <= 0.25


def test_views__with_everything_as_dali(make_photos: Callable) -> None:
    """Colours, grey, blur, solarisation and corruption, on the same plan."""
    shard_set = make_photos(16, kind="4:4:4", smallest=150, largest=300)
    batches = []
    for name in ("threads", "dali"):
        source = _Source(shard_set, EVERYTHING, sizes=(16,))
        executor = executor_class(name)(source, _options(EVERYTHING, batch_size=16))
        batches.append(next(executor)[1])
        executor.close()
    threads, dali = batches
    assert set(threads) == set(dali) == {GLOBAL, GLOBAL + CORRUPTED, LOCAL}
    for name in threads:
        difference = (threads[name].int() - dali[name].int()).abs().float()
        # Solarising turns a level of rounding at 128 into two.
        assert difference.mean() < 0.6
        assert torch.quantile(difference.flatten()[::7], 0.999) <= 8


@pytest.mark.parametrize("align", [True, False])
def test_views__corrupted_twins_are_those_of_the_whole_batch(make_photos: Callable, align: bool) -> None:
    corruption = CorruptionConfig(coverage=0.4, noise=0.3, align=align)
    config = replace(EVERYTHING, corruption=corruption)
    ((planned, views),) = _executor(_Source(make_photos(40), config, sizes=(38,)), config, num_threads=3)
    group = planned.plan.groups[GLOBAL]
    expected = corrupt(views[GLOBAL], group.corruption, group.token_mask)
    assert torch.equal(views[GLOBAL + CORRUPTED], expected)
    assert not torch.equal(views[GLOBAL], expected)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_views__do_not_depend_on_threads(make_photos: Callable, num_threads: int) -> None:
    shard_set = make_photos(40)
    expected = list(_executor(_Source(shard_set, EVERYTHING, sizes=(20, 20)), EVERYTHING, prefetch=1))
    got = list(
        _executor(_Source(shard_set, EVERYTHING, sizes=(20, 20)), EVERYTHING, num_threads=num_threads, prefetch=3)
    )
    for (_, views), (_, expected_views) in zip(got, expected, strict=True):
        assert views.keys() == expected_views.keys()
        assert all(torch.equal(views[name], expected_views[name]) for name in views)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (500, 33), (2600, 40), (3, 2)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_views__odd_shapes(size: tuple[int, int], kind: str) -> None:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    samples = Samples(
        rows=np.arange(4),
        encoded=[np.frombuffer(buffer.getvalue(), np.uint8)] * 4,
        widths=np.full(4, size[0]),
        heights=np.full(4, size[1]),
    )
    train = plan_views(EVERYTHING, seed=0, positions=np.arange(4), widths=samples.widths, heights=samples.heights,
                       patch=PATCH)  # fmt: skip
    center = plan_center(48, crop_fraction=0.875, widths=samples.widths, heights=samples.heights)
    for plan in (train, center):
        ((_, views),) = _executor(_One(PlannedBatch(samples=samples, plan=plan, position=0)), EVERYTHING)
        assert views[GLOBAL].shape == (len(plan.groups[GLOBAL].windows), 4, 3, 48, 48)


# ---------------------------------------------------------------------------------------------- batches and order


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_executor__batches_in_order_with_a_short_end(tiny_greys, prefetch: int) -> None:
    source = _Source(tiny_greys, PLAIN, sizes=(8, 8, 8, 3, 1))
    executor = _executor(source, PLAIN, prefetch=prefetch)
    batches = list(executor)
    assert [planned.position for planned, _ in batches] == [0, 8, 16, 24, 27]
    assert [views[GLOBAL].shape[1] for _, views in batches] == [8, 8, 8, 3, 1]
    assert source.asked == [0, 1, 2, 3, 4, 5]
    executor.close()
    executor.close()
    assert list(executor) == []


def test_executor__runs_ahead_as_far_as_told(tiny_greys) -> None:
    source = _Source(tiny_greys, PLAIN, sizes=(SIZE,) * 20)
    executor = _executor(source, PLAIN, prefetch=3)
    assert source.asked == []
    next(executor)
    assert source.asked == [0, 1, 2]
    next(executor)
    assert source.asked == [0, 1, 2, 3]
    executor.close()


def test_executor__views_outlive_it_and_memory_is_used_again(tiny_greys) -> None:
    executor = _executor(_Source(tiny_greys, PLAIN, sizes=(SIZE,) * 60), PLAIN)
    kept = [next(executor)[1][GLOBAL][1] for _ in range(12)]
    copies = [views.clone() for views in kept]
    places = {next(executor)[1][GLOBAL].data_ptr() for _ in range(40)}
    assert len(places) <= 4
    executor.close()
    del executor
    assert all(torch.equal(views, copy) for views, copy in zip(kept, copies, strict=True))
    assert len({views.data_ptr() for views in kept}) == 12
    assert kept[0].is_contiguous(memory_format=torch.channels_last)


def test_executor__notes_its_stages(make_photos: Callable) -> None:
    stages = Stages()
    list(_executor(_Source(make_photos(40), EVERYTHING), EVERYTHING, stages=stages))
    seconds = stages.seconds()
    assert set(seconds) == {"decode", "resize", "colour", "corrupt"}
    assert min(seconds.values()) > 0
    assert stages.stuck() == "no stage"


# ------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("bad", [(0,), (13,), (8, 9, 15), tuple(range(16, 24)), (4, 5, 6, 39)])
def test_executor__replaces_what_can_not_be_decoded(make_photos: Callable, bad: tuple[int, ...]) -> None:
    """Other samples stay as they are, also in the corrupted twins; a replacement may be bad, too."""
    shard_set = make_photos(41)
    undisturbed = list(_executor(_Source(shard_set, EVERYTHING), EVERYTHING))
    source = _Source(shard_set, EVERYTHING, bad=bad)
    batches = list(_executor(source, EVERYTHING))
    assert source.asked == [0, 1, 2, 3, 4, 5]
    assert {row for rows in source.replaced for row in rows} == set(bad)
    assert all("past the end" in reason or "no end" in reason for rows in source.replaced for reason in rows.values())
    for (planned, views), (expected, expected_views) in zip(batches, undisturbed, strict=True):
        assert planned.position == expected.position
        kept = torch.from_numpy(~np.isin(expected.samples.rows, bad))
        assert np.array_equal(planned.samples.rows == expected.samples.rows, kept.numpy())
        for name in (GLOBAL, LOCAL):
            assert torch.equal(views[name][:, kept], expected_views[name][:, kept])
        group = planned.plan.groups[GLOBAL]
        assert torch.equal(views[GLOBAL + CORRUPTED], corrupt(views[GLOBAL], group.corruption, group.token_mask))


def test_executor__replaces_what_has_another_size(make_photos: Callable) -> None:
    shard_set = make_photos(41)
    shard_set.columns.width[5] += 1
    source = _Source(shard_set, PLAIN)
    assert len(list(_executor(source, PLAIN))) == 5
    ((reason,),) = (rows.values() for rows in source.replaced)
    assert "the index says" in reason


def test_executor__spent_budget_comes_after_the_good_batches(make_photos: Callable) -> None:
    source = _Source(make_photos(41), PLAIN, bad=(2, 30))
    source.budget = 1
    executor = _executor(source, PLAIN, prefetch=4)
    for _ in range(3):
        next(executor)
    for _ in range(2):  # and it stays so: never a silent end
        with pytest.raises(TooManyBadSamples):
            next(executor)


def test_executor__source_error_comes_after_the_good_batches(tiny_greys) -> None:
    source = _Source(tiny_greys, PLAIN)
    source.error_at = 3
    executor = _executor(source, PLAIN, prefetch=4)
    for _ in range(3):
        next(executor)
    for _ in range(2):
        with pytest.raises(KeyError, match="storage is gone"):
            next(executor)
    assert source.asked == [0, 1, 2, 3]


def test_executor__error_in_a_thread_comes_after_the_good_batches(tiny_greys) -> None:
    config = replace(PLAIN, corruption=CorruptionConfig(coverage=0.4, other=1.0))
    executor = _executor(_Source(tiny_greys, config, sizes=(8, 8, 7, 8)), config, prefetch=4)
    for _ in range(2):
        next(executor)
    for _ in range(2):
        with pytest.raises(ValueError, match="even"):
            next(executor)


def test_executor__closed_in_the_middle(make_photos: Callable) -> None:
    executor = _executor(_Source(make_photos(40), EVERYTHING, sizes=(40,) * 9), EVERYTHING, prefetch=4)
    next(executor)
    assert _num_threads() == 2
    began = time.monotonic()
    executor.close()
    assert _num_threads() == 0
    assert time.monotonic() - began < 5
    assert list(executor) == []


def test_executor__left_without_close(make_photos: Callable) -> None:
    executor = _executor(_Source(make_photos(40), PLAIN), PLAIN)
    next(executor)
    del executor
    for _ in range(100):
        if not _num_threads():
            break
        time.sleep(0.1)


class _Interrupting(list):
    """Encoded samples; when a thread takes the first one, control-C is pressed."""

    is_armed = True

    def __getitem__(self, number):
        if self.is_armed:
            self.is_armed = False
            time.sleep(0.5)  # by now the caller waits
            _thread.interrupt_main()
        return super().__getitem__(number)


def test_executor__goes_on_after_an_interrupt(make_photos: Callable) -> None:
    """Control-C while the caller waits loses no batch."""
    source = _Source(make_photos(40), PLAIN)
    ((_, expected),) = _executor(_One(source.plan(0)), PLAIN)
    planned = source.plan(0)
    executor = _executor(
        _One(replace(planned, samples=replace(planned.samples, encoded=_Interrupting(planned.samples.encoded)))), PLAIN
    )
    with pytest.raises(KeyboardInterrupt):
        next(executor)
    ((_, views),) = executor
    assert torch.equal(views[GLOBAL], expected[GLOBAL])


def test_executor__refuses_device() -> None:
    with pytest.raises(ValueError, match="runs on cpu or cuda"):
        _executor(_One, PLAIN, device=torch.device("meta"))


def test_executor__survives_damaged_images(make_photos: Callable, tmp_path) -> None:
    """In a process of its own, which a crash would end."""
    whole = [photo for kind in ("4:4:4", "4:2:0", "grey") for photo in make_photos(2, kind=kind, largest=120).encoded]
    buffer = io.BytesIO()
    Image.open(io.BytesIO(whole[0])).save(buffer, "PNG")
    progressive = io.BytesIO()
    Image.open(io.BytesIO(whole[1])).save(progressive, "JPEG", progressive=True)
    whole += [buffer.getvalue(), progressive.getvalue()]
    for number, data in enumerate(whole):
        (tmp_path / str(number)).write_bytes(data)
    program = """
import io, random, sys
from pathlib import Path
import numpy as np, torch
from PIL import Image
from maestri.pipelines.executor import ExecutorOptions, PlannedBatch, group_shapes
from maestri.pipelines.reader import Samples
from maestri.pipelines.threads import ThreadsExecutor
from maestri.pipelines.views import ViewsConfig, plan_views
dice, config, num_bad = random.Random(5), ViewsConfig(size=32), 0
whole = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]
def damaged(data):
    data = bytearray(data)
    what = dice.randrange(4)
    for _ in range(dice.choice((1, 3, 30))):
        at = dice.randrange(2, 700 if what < 2 else len(data))
        data[min(at, len(data) - 1)] = dice.choice((0, 255, dice.randrange(256)))
    if what == 3:
        at = dice.randrange(len(data))
        del data[at : at + dice.choice((1, 100, 10 ** 6))]
    return bytes(data)
def planned(encoded, sizes, position):
    widths, heights = np.array(sizes, np.int64).T
    samples = Samples(rows=np.arange(10), encoded=[np.frombuffer(d, np.uint8) for d in encoded], widths=widths,
                      heights=heights)
    plan = plan_views(config, seed=0, positions=position + np.arange(10), widths=widths, heights=heights, patch=8)
    return PlannedBatch(samples=samples, plan=plan, position=position)
class Source:
    def plan(self, index):
        originals = [dice.choice(whole) for _ in range(10)]
        sizes = [Image.open(io.BytesIO(data)).size for data in originals]
        return planned([damaged(data) for data in originals], sizes, 10 * index) if index < 30 else None
    def replace(self, before, bad):
        global num_bad
        num_bad += len(bad)
        encoded = [data.tobytes() for data in before.samples.encoded]
        sizes = list(zip(before.samples.widths.tolist(), before.samples.heights.tolist()))
        for number in bad:
            encoded[number], sizes[number] = whole[0], Image.open(io.BytesIO(whole[0])).size
        return planned(encoded, sizes, before.position)
options = ExecutorOptions(shapes=group_shapes(config), batch_size=10, device=torch.device("cpu"), num_threads=2,
                          interpolation="cubic", antialias=True, prefetch=2)
executor = ThreadsExecutor(Source(), options)
print(len(list(executor)), num_bad)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    num_batches, num_bad = map(int, done.stdout.split())
    assert num_batches == 30
    assert 30 < num_bad < 270  # some damage leaves an image
