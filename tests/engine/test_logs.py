"""Rows of metrics: no duplicates after a resume, torn lines, means of the whole run."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from maestri.engine.logs import Meter, RunLog, read_rows, summarise

CPU = torch.device("cpu")


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write_rows(out: Path, steps: list[int]) -> None:
    log = RunLog(out, first_step=0)
    for step in steps:
        log.write("train", step, {"loss": float(step)})
        log.write("evaluation", step, {"knn": float(step)})
    log.close()


def test_run_log__rows_past_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    write_rows(tmp_path, [1, 2, 3])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    RunLog(tmp_path, first_step=2).close()
    rows = [(row["kind"], row["step"]) for row in read_rows(tmp_path / "metrics.jsonl")]
    assert rows == [("train", 1), ("evaluation", 1), ("train", 2)]


def test_run_log__a_new_run_starts_empty(tmp_path: Path) -> None:
    write_rows(tmp_path, [1, 2])
    RunLog(tmp_path, first_step=0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.usefixtures("one_rank")
def test_meter__unfinished_period_survives_a_checkpoint() -> None:
    def add(meter: Meter, losses: list[float]) -> None:
        for loss in losses:
            meter.add({"loss": torch.tensor(loss)}, num_images=4)

    whole, first, second = Meter(CPU), Meter(CPU), Meter(CPU)
    add(whole, [0.1, 0.2, 0.4])
    add(first, [0.1, 0.2])
    first.pause()
    second.load_state_dict(first.state_dict())
    add(second, [0.4])
    rows = [meter.take(wait_seconds=0.0, bad_samples=0) for meter in (whole, second)]
    assert rows[0]["loss"] == rows[1]["loss"] == pytest.approx(0.7 / 3)
    assert second.elapsed_seconds > first.elapsed_seconds


@pytest.mark.usefixtures("one_rank")
def test_meter__a_period_of_skipped_steps_has_no_losses() -> None:
    meter = Meter(CPU)
    meter.add({}, num_images=4)
    row = meter.take(wait_seconds=0.0, bad_samples=1)
    assert "loss" not in row and row["images_per_second"] > 0 and row["bad_samples"] == 1


def test_summarise__weighs_waiting_by_time() -> None:
    rows = [
        {"kind": "train", "step": 1, "loss": 2.0, "images_per_second": 10.0, "data_wait": 0.5},
        {"kind": "train", "step": 2, "loss": 1.0, "images_per_second": 30.0, "data_wait": 0.1},
        {"kind": "evaluation", "step": 2, "knn": 0.5},
    ]
    for row, seconds in zip(rows, (3.0, 1.0), strict=False):
        row |= {"period_seconds": seconds, "elapsed_seconds": seconds}
    summary = summarise(json.loads(json.dumps(rows)))
    assert summary["data_wait_share"] == pytest.approx(0.4)
    assert summary["images_per_second"] == 20.0
    assert summary["losses"] == {"loss": 1.0}
    assert summarise([*rows, rows[0] | {"step": 3, "loss": 4.0}])["losses"] == {"loss": 4.0}
    skipped = {name: value for name, value in rows[0].items() if name != "loss"}
    assert summarise([*rows, skipped | {"step": 3}])["losses"] == {"loss": 1.0}
    assert summary["evaluation"] == {"knn": 0.5}
    assert summarise([]) == {}
