"""Two ranks killed at the worst moments; the long form is tools/prove_training.py."""

import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from prove_training import Watch, kill_at
from small_run import Started, difference, on_ranks, started, wait_until

pytestmark = pytest.mark.long


@pytest.fixture
def kept() -> Iterator[list[Started]]:
    """A list of commands that end with the test."""
    runs: list[Started] = []
    yield runs
    for run in runs:
        run.kill()


def test_killed__run_and_then_one_rank_end_as_undisturbed(undisturbed: Any, kept: list[Started]) -> None:
    """All are killed at the start and at a checkpoint, then one rank, which torchrun heals, all in the same run."""
    folder = undisturbed.folder
    dice = random.Random(8)  # the second checkpoint, and a third of the start
    out, output = folder / "killed", folder / "killed.log"
    for moment in ("checkpoint", "start"):
        watch = Watch(out)
        kept.append(started(on_ranks(2, "--out", out.name, *undisturbed.flags), folder, output=output))
        assert kill_at(moment, kept[-1], watch, undisturbed.durations, dice), output.read_text()
    watch = Watch(out)
    command = on_ranks(2, "--out", out.name, *undisturbed.flags, restarts=2)
    run = started(command, folder, output=output)
    kept.append(run)
    assert wait_until(watch.trains, run), output.read_text()
    os.kill(max(run.ranks()), signal.SIGKILL)
    assert run.wait() == 0, output.read_text()
    lines = output.read_text().splitlines()
    assert sum(line.startswith("continuing killed after step") for line in lines) >= 1
    assert sum("another rank has ended or hangs" in line for line in lines) == 1
    assert not any("Traceback" in line for line in lines)
    assert difference(out, folder / "whole") == ""
