"""Does a study's works, some at once, each on its own cores."""

import os
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from maestri.engine.config import as_plain
from maestri.engine.logs import read_rows
from maestri.engine.stop import EXIT_STOPPED
from maestri.shards.files import write_atomically
from maestri.study.progress import StudyProgress
from maestri.study.tied import tied
from maestri.study.works import FAILURE, RECIPE, Task, Work, reason_of, write_failure

LAST_LINES = 5
"""Of a failed run's output that are kept."""
PATIENCE = 120.0
"""Seconds that trainings may take to write a checkpoint when the study is ended."""
PERIOD = 0.2
"""Seconds between looks at what runs."""


class Slot:
    """Some of the processor's cores, and what runs on them."""

    def __init__(self, cores: Sequence[int]) -> None:
        self.work: Work | None = None
        self.task: Task | None = None
        self._cores = cores
        self._tasks: Iterator[Task] = iter(())
        self._process: subprocess.Popen[bytes] | None = None

    def take(self, work: Work) -> None:
        """Starts with the first task of a work."""
        self.work, self._tasks = work, iter(work.tasks)
        (work.folder / FAILURE).unlink(missing_ok=True)
        self._start_next()

    def look(self) -> bool | None:
        """Returns how the work ended, None while it goes on; the next task is started where one has ended well."""
        assert self._process is not None and self.work is not None and self.task is not None
        code = self._process.poll()
        if code is None:
            return None
        if code:
            record_failure(self.work, self.task, code)
        elif self._start_next():
            return None
        self.work = self.task = self._process = None
        return not code

    def step(self) -> int:
        """Returns the optimizer steps of the stage in training that were logged."""
        if self.task is None or self.task.name == "judging":
            return 0
        rows = read_rows(self.task.folder / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else 0

    def terminate(self) -> None:
        """Asks what runs to end: training writes a checkpoint first."""
        if self._process is not None:
            self._process.terminate()

    def wait(self, deadline: float) -> None:
        """Waits for it, and kills it at a time of ``time.monotonic``."""
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start_next(self) -> bool:
        self.task = next(self._tasks, None)
        if self.task is None:
            return False
        task = self.task
        task.folder.mkdir(parents=True, exist_ok=True)
        recipe = OmegaConf.to_yaml(OmegaConf.create(as_plain(task.config)))
        write_atomically(Path(task.config.out) / RECIPE, recipe.encode())
        threads = str(max(1, task.config.engine.threads))
        with task.output.open("wb") as output:
            self._process = subprocess.Popen(
                tied(task.command, self._cores),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        return True


def record_failure(work: Work, task: Task, code: int) -> None:
    """Writes ``failed.json``: which task, its exit code, and the last lines that it said."""
    lines = task.output.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.strip()][-LAST_LINES:]
    if code == EXIT_STOPPED or code < 0:
        said.append(f"ended by a signal (exit code {code}); the same command continues it")
    write_failure(work.folder, task=task.name, exit_code=code, lines=said)


def cores_of_slots(jobs: int) -> list[list[int]]:
    """Returns each slot's share of the cores that this process may use; slots share cores where there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // jobs)
    return [[cores[(slot * share + at) % len(cores)] for at in range(share)] for slot in range(jobs)]


def run_all(works: Sequence[Work], slots: Sequence[Slot], progress: StudyProgress) -> int:
    """Does all works, as many at once as there are slots, and returns how many failed.

    Raises:
        KeyboardInterrupt: the study was interrupted; trainings have written checkpoints, and ended.
    """
    waiting, failed = deque(works), 0
    try:
        while waiting or any(slot.work for slot in slots):
            for slot in slots:
                if slot.work is None and waiting:
                    slot.take(waiting.popleft())
                if slot.work is None:
                    continue
                work = slot.work
                went_well = slot.look()
                if went_well is not None:
                    failed += not went_well
                    progress.ended(
                        work.label, seconds=work.seconds, failure="" if went_well else reason_of(work.folder)
                    )
            progress.show([_doing(slot) for slot in slots if slot.work])
            time.sleep(PERIOD)
    except BaseException:
        for slot in slots:
            slot.terminate()
        deadline = time.monotonic() + PATIENCE
        for slot in slots:
            slot.wait(deadline)
        raise
    return failed


def _doing(slot: Slot) -> str:
    assert slot.work is not None and slot.task is not None
    at = "" if slot.task.name == "judging" else f", step {slot.step()} of {slot.task.config.steps}"
    return f"{slot.work.label}, {slot.task.name}{at}"
