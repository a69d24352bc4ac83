"""docs/clusters/train.sbatch as SLURM runs it, with stand-ins for ``srun`` and ``scontrol``."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prove_training import Watch
from small_run import PROGRAM, RECIPE, difference, started, wait_until

pytestmark = pytest.mark.long

SCRIPT = PROGRAM.parent / "docs" / "clusters" / "train.sbatch"
# Two nodes with a task each; like srun's, the exit code is the highest of them.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=0 "$@" &
done
code=0
for job in $(jobs -p); do
    wait "$job" || code=$(($? > code ? $? : code))
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1 $2" != "show hostnames" ] || { printf '127.0.0.1\\nnode-2\\n'; exit; }
echo "$@" >> requests
"""


@pytest.fixture
def place(undisturbed: Any, tmp_path: Path) -> Path:
    """A top folder as on a cluster, with the stand-ins in ``bin``."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / PROGRAM.name).symlink_to(PROGRAM)
    for name in ("shards", RECIPE):
        (tmp_path / name).symlink_to(undisturbed.folder / name)
    return tmp_path


def variables(place: Path, tasks: int = 2) -> dict[str, str]:
    """Returns what SLURM sets, and a PATH with the stand-ins."""
    found = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NTASKS": str(tasks)}
    return found | {"PATH": f"{place / 'bin'}:{os.environ['PATH']}"}


def test_sbatch__queues_again_on_75_and_then_ends_as_undisturbed(undisturbed: Any, place: Path) -> None:
    command = ["bash", str(SCRIPT), RECIPE, "--out", "run", *undisturbed.flags]
    watch = Watch(place / "run")
    job = started(command, place, output=place / "log", **variables(place))
    assert wait_until(watch.trains, job), (place / "log").read_text()
    for number in job.ranks():
        os.kill(number, signal.SIGTERM)
    assert job.wait() == 75, (place / "log").read_text()
    assert (place / "requests").read_text() == f"requeue {os.getpid()}\n"
    job = started(command, place, output=place / "log", **variables(place))
    assert job.wait() == 0, (place / "log").read_text()
    assert (place / "requests").read_text().count("requeue") == 1
    assert "continuing run after step" in (place / "log").read_text()
    assert difference(place / "run", undisturbed.folder / "whole") == ""


def test_sbatch__failed_run_is_not_queued_again(place: Path) -> None:
    command = ["bash", str(SCRIPT), RECIPE, "--out", "run", "--data.shards", "nowhere"]
    job = started(command, place, output=place / "log", **variables(place, tasks=1))
    assert job.wait() == 1 and not (place / "requests").exists()
    assert "train.py: there is no folder nowhere" in (place / "log").read_text()


@pytest.mark.parametrize("name", ["torchrun.sh", "deepspeed.sh"])
def test_script__without_its_settings_is_one_line(name: str) -> None:
    done = subprocess.run(["bash", str(SCRIPT.with_name(name)), RECIPE], env={}, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and " names no " in done.stderr
