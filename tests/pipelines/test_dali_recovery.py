"""How DALI runs ahead; what it can't decode is replaced, and nothing else changes; no bytes bring the process down."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from maestri.pipelines.dali import DaliExecutor
from maestri.pipelines.executor import ExecutorOptions, PlannedBatch, group_shapes
from maestri.pipelines.filters import BlurConfig
from maestri.pipelines.reader import Samples, TooManyBadSamples
from maestri.pipelines.stages import Stages
from maestri.pipelines.views import GLOBAL, LocalConfig, ViewsConfig, plan_views

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
NUM_BATCHES, SIZE = 6, 8
CONFIGS = {
    "one view": ViewsConfig(size=32, count=1),
    "two views": ViewsConfig(size=32),
    "many views, filters": ViewsConfig(
        size=32, blur=BlurConfig(probability=(0.5,)), solarise=(0.5,), local=LocalConfig(count=3, size=16)
    ),
}


class _DamagedSource:
    """Batches of 8 with chosen samples cut in half; each is replaced by the row so many further on."""

    def __init__(
        self, encoded: list[bytes], sizes: np.ndarray, config: ViewsConfig, bad: set[int], *, budget: int = 99
    ) -> None:
        self.asked: list[int] = []
        self.replaced: list[dict[int, str]] = []
        self.error_at = NUM_BATCHES + 1
        self._encoded = encoded
        self._sizes = sizes
        self._config = config
        self._bad = bad
        self._budget = budget

    def plan(self, index: int) -> PlannedBatch | None:
        self.asked.append(index)
        if index == self.error_at:
            raise KeyError("the storage is gone")
        return self._planned(np.arange(SIZE) + SIZE * index, SIZE * index) if index < NUM_BATCHES else None

    def replace(self, planned: PlannedBatch, bad: Mapping[int, str]) -> PlannedBatch:
        rows = planned.samples.rows.copy()
        self.replaced.append({int(rows[at]): reason for at, reason in bad.items()})
        if sum(map(len, self.replaced)) > self._budget:
            raise TooManyBadSamples(self._budget + 1, self._budget, "key", "why")
        rows[list(bad)] += 1
        return self._planned(rows, planned.position)

    def _planned(self, rows: np.ndarray, position: int) -> PlannedBatch:
        rows = rows % len(self._encoded)
        encoded = []
        for row in rows.tolist():
            data = np.frombuffer(self._encoded[row], np.uint8)
            encoded.append(data[: len(data) // 2] if row in self._bad else data)
        widths, heights = self._sizes[rows].T
        samples = Samples(rows=rows, encoded=encoded, widths=widths, heights=heights)
        positions = position + np.arange(SIZE)
        plan = plan_views(self._config, seed=0, positions=positions, widths=widths, heights=heights, patch=8)
        return PlannedBatch(samples=samples, plan=plan, position=position)


def _executor(source: _DamagedSource, config: ViewsConfig, **changes: object) -> DaliExecutor:
    settings = {"num_threads": 2, "prefetch": 2, "batch_size": SIZE, "device": torch.device("cpu")} | changes
    return DaliExecutor(
        source,
        ExecutorOptions(
            shapes=group_shapes(config),
            interpolation=config.interpolation,
            antialias=config.antialias,
            **settings,
        ),
    )


@pytest.fixture(scope="module")
def make_source(make_photos: Callable) -> Callable[..., _DamagedSource]:
    """Makes sources of the same 48 photos."""
    photos = cache(lambda kind: make_photos(NUM_BATCHES * SIZE, kind=kind, largest=200))

    def make(config: ViewsConfig, bad: set[int], *, kind: str = "4:2:0", **options: int) -> _DamagedSource:
        shard_set = photos(kind)
        sizes = np.stack((shard_set.columns.width, shard_set.columns.height), -1).astype(np.int64)
        return _DamagedSource(shard_set.encoded, sizes, config, bad, **options)

    return make


@pytest.fixture(scope="module")
def undisturbed_batches(make_source: Callable) -> Callable[[str], list]:
    """Returns what comes out where nothing is bad."""
    return cache(lambda name: list(_executor(make_source(CONFIGS[name], set()), CONFIGS[name])))


@pytest.mark.parametrize(
    ("bad", "prefetch"),
    [({0}, 2), ({13}, 1), ({47}, 4), ({2, 11, 21, 30, 38, 47}, 3), ({5, 6, 7, 8, 9, *range(24, 32)}, 2)],
    ids=["first", "midst", "last", "every batch", "replacements, too, and a whole batch"],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_executor__other_samples_are_as_undisturbed(
    make_source: Callable, undisturbed_batches: Callable, name: str, bad: set[int], prefetch: int
) -> None:
    config = CONFIGS[name]
    undisturbed = undisturbed_batches(name)
    source = make_source(config, bad)
    batches = list(_executor(source, config, prefetch=prefetch))
    assert source.asked == list(range(NUM_BATCHES + 1))
    assert {row for rows in source.replaced for row in rows} == bad
    assert len(batches) == NUM_BATCHES
    for (planned, views), (expected, expected_views) in zip(batches, undisturbed, strict=True):
        assert planned.position == expected.position
        replaced = np.isin(expected.samples.rows, list(bad))
        assert np.array_equal(planned.samples.rows != expected.samples.rows, replaced)
        assert not np.isin(planned.samples.rows, list(bad)).any()
        for group in views:
            kept = torch.from_numpy(~replaced)
            assert torch.equal(views[group][:, kept], expected_views[group][:, kept])
            assert not torch.equal(views[group][:, ~kept], expected_views[group][:, ~kept]) or kept.all()


@pytest.mark.parametrize("kind", ["4:4:4", "grey"])
def test_executor__names_the_reason(make_source: Callable, kind: str) -> None:
    config = CONFIGS["two views"]
    source = make_source(config, {3, 20}, kind=kind)
    list(_executor(source, config))
    (first,), (second,) = source.replaced
    assert (first, second) == (3, 20)
    for reason in (*source.replaced[0].values(), *source.replaced[1].values()):
        assert reason == "DALI can't decode it: Premature end of JPEG file"


def test_executor__spent_budget_comes_after_the_good_batches(make_source: Callable) -> None:
    config = CONFIGS["two views"]
    executor = _executor(make_source(config, {10, 33}, budget=1), config)
    for _ in range(4):
        next(executor)
    for _ in range(2):
        with pytest.raises(TooManyBadSamples):
            next(executor)
    executor.close()


def test_executor__error_of_the_source_comes_after_the_recovered_batches(make_source: Callable) -> None:
    config = CONFIGS["two views"]
    source = make_source(config, {3, 20})
    source.error_at = 3
    executor = _executor(source, config, prefetch=3)
    for _ in range(3):
        next(executor)
    for _ in range(2):
        with pytest.raises(KeyError, match="storage is gone"):
            next(executor)
    assert source.asked == [0, 1, 2, 3]


def test_executor__runs_ahead(make_source: Callable) -> None:
    source, config, stages, seen = make_source(CONFIGS["two views"], set()), CONFIGS["two views"], Stages(), []
    plan = source.plan
    source.plan = lambda index: (seen.append(stages.stuck()), plan(index))[1]
    executor = _executor(source, config, prefetch=3, stages=stages)
    next(executor)
    assert source.asked == [0, 1, 2]
    next(executor)
    assert source.asked == [0, 1, 2, 3]
    executor.close()
    assert stages.seconds()["DALI"] > 0
    assert set(seen) == {"no stage"}  # what the source takes isn't DALI's


def test_executor__refuses_device(make_source: Callable) -> None:
    with pytest.raises(ValueError, match="runs on cpu or cuda"):
        _executor(make_source(ViewsConfig(), set()), ViewsConfig(), device=torch.device("meta"))


def test_executor__failure_without_a_bad_sample_is_one_clear_error(make_source: Callable) -> None:
    config = CONFIGS["two views"]
    source = make_source(config, set())
    executor = _executor(source, config, batch_size=SIZE - 1)
    for _ in range(2):  # and it stays so: never a silent end
        with pytest.raises(RuntimeError, match=r"DALI failed on the batch of rows \[0, 1, 2, 3, 4, 5, 6, 7\]"):
            next(executor)
    assert source.replaced == []


def test_executor__recovers_over_and_over(make_source: Callable) -> None:
    """Twenty times in one process: threads and memory of dropped graphs are given back."""
    config = CONFIGS["two views"]
    threads = []
    for _ in range(5):
        list(_executor(make_source(config, {1, 11, 22, 45}), config))
        threads.append(len(list(Path("/proc/self/task").iterdir())))
    assert threads[-1] <= threads[0] + 2


def test_executor__views_outlive_a_dropped_graph(make_source: Callable) -> None:
    config = CONFIGS["one view"]
    executor = _executor(make_source(config, {19}), config)
    kept = [next(executor)[1][GLOBAL] for _ in range(2)]
    copies = [views.clone() for views in kept]
    list(executor)
    assert all(torch.equal(views, copy) for views, copy in zip(kept, copies, strict=True))


def test_data_path__no_bytes_bring_it_down() -> None:
    """1,000 damaged and hostile images, through both executors; tools/fuzz_data_path.py has the long form."""
    command = [sys.executable, str(ROOT / "tools" / "fuzz_data_path.py"), "--mutations", "1000", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {
        name: int(number)
        for number, name in (part.split(" ", 1) for part in done.stdout.split(": ")[1].split(";")[0].split(", "))
    }
    for executor in ("dali", "threads"):
        refused, passed, replaced = (counts[f"{event} by {executor}"] for event in ("refused", "passed", "replaced"))
        assert refused + passed == 1000
        assert min(refused, passed - replaced, replaced) >= 100
