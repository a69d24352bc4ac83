"""The loader: purity in the position, elasticity, resume, bad samples, clean end."""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from maestri.pipelines.ahead import LoaderStuck
from maestri.pipelines.batch import Batch
from maestri.pipelines.config import DataConfig
from maestri.pipelines.corruption import CorruptionConfig
from maestri.pipelines.loader import Loader
from maestri.pipelines.masks import MaskConfig
from maestri.pipelines.reader import TooManyBadSamples
from maestri.pipelines.selection import SelectionConfig
from maestri.pipelines.views import GLOBAL, LocalConfig, ViewsConfig

_VIEWS = ViewsConfig(size=28)
_TENSORS = ("labels", "rows")
_GROUPS = ("views", "token_mask", "visible", "masked")


@pytest.fixture(autouse=True, params=["dali", "threads"])
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs every test with both executors."""
    monkeypatch.setattr("maestri.pipelines.loader.choose_executor", lambda name, device: request.param)
    return request.param


def _loader(shard_set, **changes) -> Loader:
    fields = {field.name for field in dataclasses.fields(DataConfig)}
    data = DataConfig(shards="", **{name: changes.pop(name) for name in fields & changes.keys()})
    settings = {
        "config": data, "views": _VIEWS, "patch": 4, "seed": 5, "rank": 0, "world_size": 1, "global_size": 16,
        "device": torch.device("cpu"),
    }  # fmt: skip
    return Loader(shard_set, **(settings | changes))


def _take(loader: Loader, count: int) -> list[Batch]:
    return [next(loader) for _ in range(count)]


def _assert_equal(batch: Batch, other: Batch) -> None:
    assert batch.position == other.position
    for name in _TENSORS:
        assert torch.equal(getattr(batch, name), getattr(other, name)), name
    for name in _GROUPS:
        for group in getattr(batch, name):
            assert torch.equal(getattr(batch, name)[group], getattr(other, name)[group]), name


def test_next__shapes_and_types(tiny_greys) -> None:
    with _loader(tiny_greys) as loader:
        batch = next(loader)
    views, token_mask = batch.views[GLOBAL], batch.token_mask[GLOBAL]
    assert views.shape == (2, 16, 3, 28, 28)
    assert views.dtype == torch.uint8
    assert views[0].is_contiguous(memory_format=torch.channels_last)
    assert token_mask.shape == (2, 16, 49)
    assert token_mask.dtype == torch.bool
    assert (token_mask.sum(-1) == 37).all()
    for indices, hidden in ((batch.visible[GLOBAL], False), (batch.masked[GLOBAL], True)):
        assert indices.dtype == torch.int64
        assert (indices.diff(dim=-1) > 0).all()
        assert (token_mask.gather(-1, indices) == hidden).all()
    assert batch.visible[GLOBAL].shape[-1] + batch.masked[GLOBAL].shape[-1] == 49
    assert batch.labels.tolist() == (batch.rows % 10).tolist()
    assert batch.position == 0


def test_next__each_row_once_an_epoch(tiny_greys) -> None:
    with _loader(tiny_greys) as loader:
        rows = torch.cat([batch.rows for batch in _take(loader, 5)])
    assert sorted(rows[:40].tolist()) == list(range(40))
    assert sorted(rows[40:].tolist()) == list(range(40))


def test_next__holdout_is_never_taken(tiny_greys) -> None:
    with _loader(tiny_greys, holdout=10) as loader:
        rows = torch.cat([batch.rows for batch in _take(loader, 6)])
    assert set(rows.tolist()) == set(range(30))


@pytest.mark.parametrize("taken", [0, 1, 3, 4])
def test_load_state_dict__resume_is_bit_equal(tiny_greys, taken: int) -> None:
    with _loader(tiny_greys) as loader:
        _take(loader, taken)
        state = loader.state_dict()
        expected = _take(loader, 3)
    assert state["position"] == taken * 16  # what is prefetched is not taken
    with _loader(tiny_greys) as loader:
        loader.load_state_dict(state)
        for batch, other in zip(_take(loader, 3), expected, strict=True):
            _assert_equal(batch, other)
        loader.load_state_dict(state)
        _assert_equal(next(loader), expected[0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_next__world_sizes_share_the_global_batch(tiny_greys, world_size: int) -> None:
    with _loader(tiny_greys) as loader:
        whole = _take(loader, 3)
    for rank in range(world_size):
        with _loader(tiny_greys, rank=rank, world_size=world_size) as loader:
            if rank == 1:
                loader.load_state_dict(loader.state_dict() | {"position": 16})
            for batch in _take(loader, 2):
                step, start = divmod(batch.position, 16)
                assert start == rank * 16 // world_size
                part = slice(start, start + 16 // world_size)
                for name in _TENSORS:
                    assert torch.equal(getattr(batch, name), getattr(whole[step], name)[part])
                for name in _GROUPS:
                    assert torch.equal(getattr(batch, name)[GLOBAL], getattr(whole[step], name)[GLOBAL][:, part])


@pytest.mark.parametrize("change", [{"seed": 6}, {"global_size": 8}, {"num_rows": 39}])
def test_load_state_dict__refuses_another_run(tiny_greys, change: dict[str, int]) -> None:
    state = _loader(tiny_greys).state_dict()
    with pytest.raises(ValueError, match=f"saved with {next(iter(change))} "):
        _loader(tiny_greys, **change).load_state_dict(state)


@pytest.mark.parametrize("position", [-16, 7, 1.5])
def test_load_state_dict__refuses_position(tiny_greys, position: float) -> None:
    loader = _loader(tiny_greys)
    with pytest.raises(ValueError, match="position is"):
        loader.load_state_dict(loader.state_dict() | {"position": position})
    with pytest.raises(ValueError, match="state holds"):
        loader.load_state_dict({"position": 0})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"holdout": 40}, "0 rows to train on"),
        ({"num_rows": 41}, "41 rows to train on"),
        ({"patch": 5}, "views.size is 28"),
        ({"world_size": 3}, "does not divide"),
    ],
)
def test_loader__refuses(tiny_greys, change: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        _loader(tiny_greys, **change)


def _damage(shard_set, row: int, how: str) -> None:
    data = shard_set.encoded[row]
    if how == "crc":
        shard_set.encoded[row] = data[:100] + bytes([data[100] ^ 1]) + data[101:]
        return
    shard_set.encoded[row] = {"garbage": b"garbage" * 50, "empty": b"", "cut": data[:200]}[how]
    shard_set.columns.crc32[row] = __import__("zlib").crc32(shard_set.encoded[row])


@pytest.mark.parametrize("how", ["crc", "garbage", "empty", "cut"])
def test_next__bad_samples_are_replaced(make_photos: Callable, caplog: pytest.LogCaptureFixture, how: str) -> None:
    shard_set = make_photos(40, kind="grey", smallest=28, largest=29)
    with _loader(shard_set) as loader:
        good = _take(loader, 5)
    for row in (7, 8, 39):
        _damage(shard_set, row, how)
    with caplog.at_level(logging.WARNING), _loader(shard_set, max_bad=3) as loader:
        batches = _take(loader, 5)
        assert loader.num_bad == 3
    assert sum("fake/000007 (row 7, shard 0)" in message for message in caplog.messages) == 1
    stand_in = {7: 9, 8: 9, 39: 0}
    for batch, other in zip(batches, good, strict=True):
        rows = other.rows.tolist()
        assert batch.rows.tolist() == [stand_in.get(row, row) for row in rows]
        assert batch.labels.tolist() == [stand_in.get(row, row) % 10 for row in rows]
        untouched = torch.tensor([row not in stand_in for row in rows])
        assert torch.equal(batch.views[GLOBAL][:, untouched], other.views[GLOBAL][:, untouched])
        assert torch.equal(batch.token_mask[GLOBAL], other.token_mask[GLOBAL])


def test_next__stops_past_the_budget(make_photos: Callable) -> None:
    shard_set = make_photos(40, kind="grey", smallest=28, largest=29)
    for row in (7, 8, 39):
        _damage(shard_set, row, "crc")
    with _loader(shard_set, max_bad=2) as loader, pytest.raises(TooManyBadSamples, match="3 bad samples.*allows 2"):
        _take(loader, 5)


def test_next__index_that_disagrees_is_a_bad_sample(make_photos: Callable) -> None:
    shard_set = make_photos(40, kind="grey", smallest=28, largest=29)
    shard_set.columns.width[3] = 29
    with _loader(shard_set) as loader:
        rows = torch.cat([batch.rows for batch in _take(loader, 3)]).tolist()
        assert loader.num_bad == 1
    assert 3 not in rows


def test_wait_seconds__counts_only_waiting(tiny_greys) -> None:
    with _loader(tiny_greys) as loader:
        began = time.perf_counter()
        next(loader)
        first = time.perf_counter() - began
        assert 0 < loader.wait_seconds <= first
        waited = loader.wait_seconds
        time.sleep(1)
        assert loader.wait_seconds == waited
        next(loader)
        # The second batch was made during the sleep.
        assert loader.wait_seconds - waited < 0.5


def _num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted through /proc")
def test_close__leaves_no_thread(tiny_greys) -> None:
    _loader_once(tiny_greys)  # what DALI keeps for the life of the process
    before, python_threads = _num_threads(), threading.active_count()
    loader = _loader(tiny_greys)
    _take(loader, 2)
    assert _num_threads() > before
    loader.close()
    loader.close()
    for _ in range(50):
        if _num_threads() <= before:
            break
        time.sleep(0.05)
    assert _num_threads() <= before
    assert threading.active_count() == python_threads
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def _loader_once(shard_set) -> None:
    with _loader(shard_set) as loader:
        next(loader)


def test_next__same_batch_whatever_the_threads(make_photos: Callable) -> None:
    shard_set = make_photos(24, smallest=60, largest=200)
    batches = []
    for num_threads, prefetch in ((1, 1), (2, 3)):
        config = DataConfig(shards="", num_threads=num_threads, prefetch=prefetch)
        with _loader(shard_set, config=config) as loader:
            batches.append(_take(loader, 3))
    for batch, other in zip(*batches, strict=True):
        _assert_equal(batch, other)


def test_next__one_view_needs_no_copy(tiny_greys) -> None:
    with _loader(tiny_greys, views=ViewsConfig(size=28, count=1, mask=MaskConfig(ratio=0.0))) as loader:
        batches = _take(loader, 4)
        copies = [batch.views[GLOBAL].clone() for batch in batches]
        _take(loader, 8)
    for batch, copy in zip(batches, copies, strict=True):
        assert torch.equal(batch.views[GLOBAL], copy)
        assert batch.masked[GLOBAL].shape == (1, 16, 0)
        assert batch.visible[GLOBAL].shape == (1, 16, 49)


def test_labels__numpy_order(tiny_greys) -> None:
    with _loader(tiny_greys) as loader:
        batch = next(loader)
    assert np.array_equal(batch.labels.numpy(), tiny_greys.label(batch.rows.numpy()))


def test_next__more_ranks_than_rows(tiny_greys) -> None:
    """Five rows for eight ranks of two samples: epochs follow each other inside a batch, and no rank is idle."""
    rows = []
    for rank in range(8):
        with _loader(tiny_greys, num_rows=5, rank=rank, world_size=8) as loader:
            rows += next(loader).rows.tolist()
    assert [sorted(rows[first : first + 5]) for first in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3


def test_next__images_of_one_pixel(make_photos: Callable) -> None:
    shard_set = make_photos(16, smallest=1, largest=2)
    with _loader(shard_set) as loader:
        views = next(loader).views[GLOBAL]
    assert (views == views[..., :1, :1]).all(), "a pixel enlarged is one colour"


def test_next__selected_rows_alone(tiny_greys) -> None:
    with _loader(tiny_greys, select=SelectionConfig(fraction=0.5)) as loader:
        rows = torch.cat([batch.rows for batch in _take(loader, 5)]).tolist()
        state = loader.state_dict()
    assert len(set(rows[:20])) == 20
    assert sorted(rows[:20]) == sorted(rows[20:40]) == sorted(rows[40:60])
    with pytest.raises(ValueError, match="saved with selected "):
        _loader(tiny_greys, select=SelectionConfig(fraction=0.5, seed=1)).load_state_dict(state)


def test_next__bad_selected_samples_are_replaced_by_selected_ones(make_photos: Callable) -> None:
    shard_set = make_photos(40, kind="grey", smallest=28, largest=29)
    select = SelectionConfig(fraction=0.5)
    with _loader(shard_set, select=select) as loader:
        chosen = sorted({row for batch in _take(loader, 3) for row in batch.rows.tolist()})
    for row in (chosen[3], chosen[-1]):
        _damage(shard_set, row, "crc")
    with _loader(shard_set, select=select) as loader:
        rows = torch.cat([batch.rows for batch in _take(loader, 5)]).tolist()
        assert loader.num_bad == 2
    assert set(rows) == set(chosen) - {chosen[3], chosen[-1]}
    assert rows.count(chosen[4]) == rows.count(chosen[0]) == 8


@pytest.mark.parametrize("num_threads", [2, 5])
def test_next__readers_change_nothing(tiny_greys, num_threads: int) -> None:
    before = threading.active_count()
    with _loader(tiny_greys) as one, _loader(tiny_greys, read_threads=num_threads) as several:
        for batch, other in zip(_take(one, 3), _take(several, 3), strict=True):
            _assert_equal(batch, other)
    for _ in range(50):
        if threading.active_count() == before:
            break
        time.sleep(0.05)
    assert threading.active_count() == before


def test_next__storage_that_hangs_is_named(make_photos: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    shard_set = make_photos(40, kind="grey", smallest=28, largest=29)
    answer, original = threading.Event(), shard_set.read_checked

    def hang(rows: np.ndarray) -> list[bytes]:
        answer.wait(30)
        return original(rows)

    with _loader(shard_set, timeout=0.5) as loader:
        monkeypatch.setattr(shard_set, "read_checked", hang)
        with pytest.raises(LoaderStuck, match=r"read 16 samples of shard 0 for \d s"):
            _take(loader, 30)
        answer.set()


def test_next__local_and_corrupted_views(make_photos: Callable) -> None:
    shard_set = make_photos(24, smallest=60, largest=120)
    views = ViewsConfig(
        size=32,
        corruption=CorruptionConfig(coverage=0.5, align=False),
        local=LocalConfig(count=3, size=16),
    )
    with _loader(shard_set, views=views, patch=8) as loader:
        batch = next(loader)
    assert {name: tuple(group.shape) for name, group in batch.views.items()} == {
        "global": (2, 16, 3, 32, 32),
        "global_corrupted": (2, 16, 3, 32, 32),
        "local": (3, 16, 3, 16, 16),
    }
    assert set(batch.token_mask) == {"global", "local"}
    assert set(batch.visible) == set(batch.masked) == {"local"}
    assert not batch.token_mask["local"].any()
    pixels = batch.pixel_mask["global"]
    clean, corrupted = batch.views["global"], batch.views["global_corrupted"]
    same = (clean == corrupted).all(2)
    assert same[~pixels].all()
    assert (~same[pixels]).float().mean() > 0.9
    by_token = pixels.view(2, 16, 4, 8, 4, 8).any(5).any(3).flatten(2)
    assert torch.equal(by_token, batch.token_mask["global"])


def test_next__varying_masks_have_no_indices(tiny_greys) -> None:
    views = ViewsConfig(size=28, mask=MaskConfig(kind="block", ratio=0.3, spread=0.2, unmasked=0.5))
    with _loader(tiny_greys, views=views) as loader:
        batch = next(loader)
    assert not batch.visible and not batch.masked
    assert batch.token_mask[GLOBAL].sum(-1).unique().numel() > 2
