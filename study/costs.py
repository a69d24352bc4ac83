"""What a step of each stage costs: time, in turns and alone on the machine, and memory.

``OUT/costs.json`` keeps it, by a digest of the settings that a step's time depends on, so that steps are timed once.
"""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from maestri.engine.config import as_plain
from maestri.engine.errors import RunError
from maestri.shards.files import write_atomically
from maestri.study.config import TimingConfig
from maestri.study.entries import Entry, Stage
from maestri.study.tied import tied

MOST_AT_ONCE = 16
"""Stages that are built, and take turns, at once; each is a process with its own memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a stage's step costs."""

    step_seconds: float
    """Median over rounds of a round's mean step: what is done every few steps counts."""
    images: int
    """Per step."""
    peak_bytes: int
    """Most that the process has had resident above what libraries take; on a GPU, most that torch has allocated."""
    teachers: tuple[str, ...]
    """Their roles."""
    rounds: tuple[float, ...]
    """Each round's mean seconds."""
    measured: str
    """When."""

    @property
    def images_per_second(self) -> float:
        """Images that training sees a second."""
        return self.images / self.step_seconds


@dataclass(kw_only=True, slots=True)
class Costs:
    """All that were measured, and where."""

    hardware: dict[str, str] = field(default_factory=dict)
    """As ``profiler.measure.hardware`` tells it."""
    stages: dict[str, Cost] = field(default_factory=dict)
    """By a stage's key."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why a stage could not be timed this time, by its key."""

    def save(self, path: Path) -> None:
        """Writes ``costs.json``; failures are tried again next time."""
        found = {"hardware": self.hardware, "stages": {key: asdict(cost) for key, cost in self.stages.items()}}
        write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())


def load_costs(path: Path) -> Costs:
    """Returns what ``costs.json`` holds; nothing if there is none.

    Raises:
        RunError: it cannot be read.
    """
    if not path.is_file():
        return Costs()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        stages = {
            key: Cost(**{**cost, "teachers": tuple(cost["teachers"]), "rounds": tuple(cost["rounds"])})
            for key, cost in found["stages"].items()
        }
        return Costs(hardware=found["hardware"], stages=stages)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is not what was written ({error}); delete it, and steps are timed again") from None


def untimed(entries: Sequence[Entry], costs: Costs) -> list[list[Stage]]:
    """Returns the stages without a cost, set by set, each once."""
    groups: dict[str, dict[str, Stage]] = {}
    known = set(costs.stages)
    for entry in entries:
        for stage in entry.stages:
            if stage.key not in known:
                known.add(stage.key)
                groups.setdefault(entry.set_name, {})[stage.key] = stage
    return [list(of_set.values()) for of_set in groups.values()]


def measure(
    stages: Sequence[Stage],
    timing: TimingConfig,
    costs: Costs,
    *,
    folder: Path,
    cores: Collection[int],
    on_turn: Callable[[], None],
) -> None:
    """Times stages in turns and adds them to ``costs``; nothing else should run on the machine meanwhile.

    Args:
        stages: of one set.
        timing: rounds and steps.
        costs: where they are added, failures among them.
        folder: for the workers' recipes and what they say.
        cores: that every worker runs on, as a run will.
        on_turn: called after each worker's start and after each of its turns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(stages), MOST_AT_ONCE):
        with ExitStack() as stack:
            workers = []
            for stage in stages[first : first + MOST_AT_ONCE]:
                workers.append(stack.enter_context(_Worker(stage, folder, cores)))
                workers[-1].read()
                on_turn()
            for number in range(timing.rounds):
                at = number % len(workers)
                for worker in workers[at:] + workers[:at]:  # another one is first in each round
                    worker.turn(timing.steps)
                    on_turn()
            for worker in workers:
                worker.finish(costs)


class _Worker:
    """A process that has built a stage and makes steps on request; once it fails, it does nothing more."""

    def __init__(self, stage: Stage, folder: Path, cores: Collection[int]) -> None:
        self._stage = stage
        self._seconds: list[list[float]] = []
        self._hardware: dict[str, str] = {}
        self._failure = ""
        recipe = folder / f"{stage.key}.yaml"
        write_atomically(recipe, OmegaConf.to_yaml(OmegaConf.create(as_plain(stage.config))).encode())
        self._log = recipe.with_suffix(".txt")
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                tied(["-m", "maestri.study.timing", str(recipe)], cores),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(stage.config.engine.threads)},
                start_new_session=True,
            )

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *of_block: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def turn(self, steps: int) -> None:
        """Makes the steps of a round."""
        seconds = self._ask(steps)
        if seconds:
            self._seconds.append(seconds)

    def finish(self, costs: Costs) -> None:
        """Adds what was measured, or why it was not."""
        rest = self._ask(0)
        if self._failure:
            costs.failures[self._stage.key] = self._failure
            return
        costs.hardware = self._hardware
        costs.stages[self._stage.key] = Cost(
            step_seconds=statistics.median(map(statistics.fmean, self._seconds)),
            images=self._stage.config.batch.global_size,
            peak_bytes=rest["peak_bytes"],
            teachers=tuple(rest["teachers"]),
            rounds=tuple(map(statistics.fmean, self._seconds)),
            measured=time.strftime("%Y-%m-%d %H:%M"),
        )

    def read(self) -> Any:
        """Returns the worker's next answer; None once it has failed."""
        if self._failure:
            return None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: Any = json.loads(line) if line else {"error": _last_line(self._log) or "its process was killed"}
        if "error" in answer:
            self._failure = answer["error"]
        elif "hardware" in answer:
            self._hardware = answer["hardware"]
        return answer

    def _ask(self, steps: int) -> Any:
        if self._failure:
            return None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # what it said last tells why
            print(steps, file=self._process.stdin, flush=True)
        answer = self.read()
        return None if self._failure else answer


def _last_line(path: Path) -> str:
    return next(iter(reversed(path.read_text(encoding="utf-8").splitlines())), "")
