"""Metrics of a run: sums on the device, one row per period, JSON lines and TensorBoard."""

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from maestri.engine.boards import Board
from maestri.engine.distributed import mean_over_ranks
from maestri.shards.files import write_atomically


class Meter:
    """Means over a logging period, kept on the device; ranks meet once per period."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._seconds = 0.0
        self._images = 0
        self._clock = time.perf_counter()
        self.elapsed_seconds = 0.0
        """Training time of the whole run so far, without evaluation and checkpoints."""

    def add(self, metrics: Mapping[str, Tensor], *, num_images: int) -> None:
        """Adds a step's scalars, none of a step that was skipped; nothing is synchronised."""
        for name, value in metrics.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._images += num_images

    def pause(self) -> None:
        """Stops the clock, for work that is not training."""
        passed = time.perf_counter() - self._clock
        self._seconds += passed
        self.elapsed_seconds += passed

    def go_on(self) -> None:
        """Starts the clock again after ``pause``."""
        self._clock = time.perf_counter()

    def take(self, *, wait_seconds: float, bad_samples: int) -> dict[str, float]:
        """Returns the period's means over steps and ranks, and starts a new period; waits for the device.

        Args:
            wait_seconds: What this rank waited for data in the period.
            bad_samples: What this rank has replaced so far; the row has the sum over ranks.
        """
        names = sorted(self._sums)
        local = torch.tensor([wait_seconds, bad_samples], dtype=torch.float64, device=self._device)
        values = [self._sums[name].to(self._device) / self._counts[name] for name in names]
        *means, waited, bad = mean_over_ranks(torch.stack([*values, *local])).tolist()
        self.pause()
        self.go_on()
        row: dict[str, float] = dict(zip(names, means, strict=True))
        row["images_per_second"] = self._images / self._seconds
        row["data_wait"] = min(1.0, waited / self._seconds)
        row["bad_samples"] = round(bad * dist.get_world_size())
        row["period_seconds"] = self._seconds
        row["elapsed_seconds"] = self.elapsed_seconds
        self._sums, self._counts, self._seconds, self._images = {}, {}, 0.0, 0
        return row

    def state_dict(self) -> dict[str, Any]:
        """Returns the unfinished period of this rank."""
        return {
            "sums": {name: value.cpu() for name, value in self._sums.items()},
            "counts": dict(self._counts),
            "seconds": self._seconds,
            "images": self._images,
            "elapsed_seconds": self.elapsed_seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the period of ``state_dict``."""
        self._sums = {name: value.to(self._device) for name, value in state["sums"].items()}
        self._counts = dict(state["counts"])
        self._seconds, self._images = state["seconds"], state["images"]
        self.elapsed_seconds = state["elapsed_seconds"]
        self._clock = time.perf_counter()


def merged_periods(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns one ``Meter.state_dict`` for every rank of another number of ranks: the mean over those there were."""
    merged = dict(states[0])
    merged["sums"] = {
        name: torch.stack([state["sums"][name] for state in states]).mean(dim=0) for name in states[0]["sums"]
    }
    return merged


class RunLog:
    """``metrics.jsonl`` in a run's folder, and boards that show the same; only the main process has one.

    A row is ``{"kind": "train" | "evaluation", "step": n, …}``; ``step`` counts optimizer steps done.
    """

    def __init__(self, out: Path, *, first_step: int, boards: Sequence[Board] = ()) -> None:
        """Continues the log of a run that resumes after ``first_step`` steps; rows past it are dropped.

        So is an evaluation at ``first_step`` itself, which comes after that step's checkpoint and is done again.
        """
        self.path = out / "metrics.jsonl"
        last_step = {"train": first_step, "evaluation": first_step - 1}
        kept = [row for row in read_rows(self.path) if row["step"] <= last_step[row["kind"]]]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = self.path.open("a", encoding="utf-8")
        self._boards = boards

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Appends a row."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        for board in self._boards:
            board.write(kind, step, values)

    def sync(self) -> None:
        """Brings rows to the disk; call it before a checkpoint that is to continue after them."""
        os.fsync(self._file.fileno())
        for board in self._boards:
            board.sync()

    def close(self) -> None:
        """Closes files and threads; may be called again."""
        if not self._file.closed:
            self._file.close()
            for board in self._boards:
                board.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a ``metrics.jsonl``, without a last line torn by a crash; none if there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def last_with_loss(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the last row that has losses, empty if none has: the row of a period of skipped steps has none."""
    return next((row for row in reversed(rows) if "loss" in row), {})


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what a run's rows tell about the whole run: speed, waiting, time, last losses and last evaluation."""
    train = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    if not train:
        return {}
    seconds = sum(row["period_seconds"] for row in train)
    summary: dict[str, Any] = {
        "steps": train[-1]["step"],
        "images_per_second": statistics.median(row["images_per_second"] for row in train),
        "data_wait_share": sum(row["data_wait"] * row["period_seconds"] for row in train) / seconds,
        "train_seconds": train[-1]["elapsed_seconds"],
        "losses": {name: value for name, value in last_with_loss(train).items() if name.startswith("loss")},
    }
    if evaluations:
        last = evaluations[-1]
        summary["evaluation"] = {name: value for name, value in last.items() if name not in ("kind", "step")}
    return summary


def write_summary(out: Path, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Writes ``out/summary.json`` from the run's rows and ``extra``, and returns it."""
    summary = summarise(read_rows(out / "metrics.jsonl")) | dict(extra)
    write_atomically(out / "summary.json", (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
    return summary
