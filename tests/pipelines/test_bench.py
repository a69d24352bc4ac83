"""``maestri pipelines bench``: what it measures and how it tunes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maestri.pipelines import cli
from maestri.pipelines.bench import Bench, measure, tune
from maestri.pipelines.config import DataConfig
from maestri.pipelines.views import ViewsConfig
from maestri.shards.convert import ConvertConfig, convert
from maestri.shards.shard_set import ShardSet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(make_photos: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a set of 30 photographs."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "source").mkdir()
    for row, data in enumerate(make_photos(30, smallest=40, largest=80).encoded):
        (folder / "source" / f"{row:03d}.jpg").write_bytes(data)
    convert(folder / "source", folder / "set", ConvertConfig(workers=1))
    return folder / "set"


@pytest.mark.parametrize("executor", ["threads", "dali"])
def test_bench__json(shards: Path, capsys: pytest.CaptureFixture[str], executor: str) -> None:
    words = "--batch 8 --batches 3 --rounds 2 --patch 8 --views.size 32 --json --device cpu --data.executor".split()
    assert cli.run(["bench", str(shards), *words, executor]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert result["executor"] == executor
    assert result["images"] == 48
    stages = {"threads": {"decode", "resize", "colour"}, "dali": {"DALI"}}[executor]
    assert stages | {"order", "read", "plan"} <= set(result["stage_us"])
    assert min(result["stage_us"].values()) > 0
    assert 0 < result["batch_ms"]["p50"] <= result["batch_ms"]["p99"]
    assert result["decode_limit"] > 0
    # Two views, a mask of 16 tokens each, and 16 indices of 8 bytes.
    assert result["batch_bytes"] == 8 * 2 * (3 * 32 * 32 + 16 + 16 * 8)


def test_bench__for_people(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--batch 8 --batches 1 --rounds 1 --patch 8 --views.size 32 --device cpu --tune".split()
    assert cli.run(["bench", str(shards), *words]) == 0
    shown = capsys.readouterr().out
    assert "data.num_threads" in shown and "images/s per core in use" in shown
    assert shown.rstrip().splitlines()[-4] == "data:"


def test_measure__speed_is_what_the_clock_says(shards: Path) -> None:
    views = ViewsConfig(size=32)
    with ShardSet.open(shards) as shard_set:
        result = measure(
            shard_set,
            config=DataConfig(shards=""),
            views=views,
            patch=8,
            batch_size=10,
            device=CPU,
            batches=4,
            rounds=1,
            with_limit=False,
        )
        mean_bytes = float(shard_set.columns.bytes.mean())
    assert result.decode_limit == 0
    assert result.megabytes_per_second == pytest.approx(result.images_per_second * mean_bytes / 1e6, rel=0.3)


def test_bench__bad_input(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", str(shards), "--rounds", "0"]) == 1
    assert capsys.readouterr().err == "maestri pipelines: --rounds is 0; expected at least 1\n"


def test_tune__takes_the_fastest_and_ignores_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))
    asked = []

    def measured(config: DataConfig) -> Bench:
        asked.append(config)
        speed = {1: 100.0, 2: 200.0, 4: 202.0, 6: 150.0}[config.num_threads] * {1: 0.5, 2: 1.0, 4: 1.01}[
            config.prefetch
        ]
        return replace(_BENCH, images_per_second=speed)

    best, tried = tune(DataConfig(shards="", executor="threads"), CPU, measured)
    assert (best.num_threads, best.prefetch, best.read_threads) == (2, 2, 1)
    assert [value for name, value, _ in tried if name == "num_threads"] == [1, 2, 4, 6]
    assert [config.num_threads for config in asked[4:]] == [2] * 5


_BENCH = Bench(
    executor="threads",
    num_threads=1,
    read_threads=1,
    prefetch=1,
    images=1,
    images_per_second=1.0,
    megabytes_per_second=1.0,
    images_per_core_second=1.0,
    batch_ms={},
    stage_us={},
    decode_limit=0.0,
    batch_bytes=0,
)
