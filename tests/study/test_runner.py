"""Works in slots: what fails is recorded and the rest goes on; what is interrupted ends; nothing is left behind."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from maestri.engine.config import RunConfig
from maestri.engine.config_files import save_config
from maestri.study.config import JudgingConfig, load_study
from maestri.study.entries import read_entries
from maestri.study.plan import runs_of
from maestri.study.progress import StudyProgress
from maestri.study.runner import Slot, cores_of_slots, run_all
from maestri.study.tied import tied
from maestri.study.works import FAILURE, JUDGEMENT, Task, Work, check_places, conditions, is_judged
from tests.study.small_study import alive

CORES = sorted(os.sched_getaffinity(0))


def work(config: RunConfig, folder: Path, *programs: str) -> Work:
    """Returns a work of small Python programs, one after the other."""
    tasks = tuple(
        Task(name=f"part {number}", command=("-c", text), folder=folder, config=config)
        for number, text in enumerate(programs)
    )
    return Work(label=folder.name, folder=folder, seconds=1.0, tasks=tasks)


@pytest.fixture
def config(folder: Path) -> RunConfig:
    study = load_study(Path("study.yaml"))
    return read_entries(study, open_images=False)[0].stages[0].config


def shown() -> tuple[StudyProgress, io.StringIO]:
    """Returns a progress of three works, and what it prints."""
    text = io.StringIO()
    return StudyProgress("runs", works=3, seconds=3.0, jobs=2, console=Console(file=text, width=200)), text


def test_run_all__a_failure_is_recorded_and_the_rest_goes_on(folder: Path, config: RunConfig) -> None:
    leaves = "from pathlib import Path; Path('{}').touch()"
    fails = "import sys; print('first'); sys.exit('train.py: no such thing')"
    works = [
        work(config, folder / "broken", fails, leaves.format("never")),
        work(config, folder / "two", leaves.format("one"), leaves.format("two_done")),
        work(config, folder / "last", leaves.format("last_done")),
    ]
    progress, text = shown()
    assert run_all(works, [Slot(CORES[:1]), Slot(CORES[:1])], progress) == 1
    assert Path("two_done").exists() and Path("last_done").exists() and not Path("never").exists()
    record = json.loads((folder / "broken" / FAILURE).read_text())
    assert record == {"task": "part 0", "exit_code": 1, "lines": ["first", "train.py: no such thing"]}
    assert "broken: failed: part 0: train.py: no such thing" in text.getvalue()
    assert "[3/3]" in text.getvalue() and not (folder / "last" / FAILURE).exists()


def test_run_all__another_try_forgets_the_failure(folder: Path, config: RunConfig) -> None:
    progress, _ = shown()
    assert run_all([work(config, folder / "run", "import os; os.abort()")], [Slot(CORES)], progress) == 1
    assert "ended by a signal (exit code -6)" in (folder / "run" / FAILURE).read_text()
    assert run_all([work(config, folder / "run", "pass")], [Slot(CORES)], progress) == 0
    assert not (folder / "run" / FAILURE).exists()


def test_run_all__interruption_lets_trainings_write_and_waits_for_them(folder: Path, config: RunConfig) -> None:
    """SIGTERM reaches the child, whose handler ends it in its own time; the study's loop waits."""
    program = """
import signal, sys, time
from pathlib import Path
def end(*_):
    time.sleep(0.3)
    Path('checkpoint').touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, end)
Path('ready').touch()
time.sleep(60)
"""

    class Interrupted(StudyProgress):
        def show(self, under_way: object) -> None:
            if Path("ready").exists():
                raise KeyboardInterrupt

    progress = Interrupted("runs", works=1, seconds=1.0, jobs=1, console=Console(file=io.StringIO()))
    with pytest.raises(KeyboardInterrupt):
        run_all([work(config, folder / "run", program)], [Slot(CORES)], progress)
    assert Path("checkpoint").exists()


def test_check_places__a_run_with_other_settings_is_named(folder: Path) -> None:
    study = load_study(Path("study.yaml"))
    entries = read_entries(study)
    seconds = {stage.key: 0.5 for entry in entries for stage in entry.stages}
    runs = runs_of(study, entries, seconds)
    out = Path(runs[1].configs[0].out)
    out.mkdir(parents=True)
    save_config(runs[1].configs[0], out)
    check_places(runs)
    save_config(runs[0].configs[0], out)
    with pytest.raises(ValueError, match=r"plmae/seed0 holds a run with other settings: method.name \(mae → plmae\)"):
        check_places(runs)


def test_is_judged__under_these_conditions_after_so_many_steps(tmp_path: Path, config: RunConfig) -> None:
    settings = JudgingConfig(k=3)
    wanted = conditions(settings, config)
    assert not is_judged(tmp_path, wanted, step=6)
    (tmp_path / JUDGEMENT).write_text(json.dumps({"settings": wanted, "step": 6}))
    assert is_judged(tmp_path, wanted, step=6) and is_judged(tmp_path, wanted)
    assert not is_judged(tmp_path, wanted, step=7)
    assert not is_judged(tmp_path, conditions(replace(settings, shots=(1,)), config), step=6)
    other = replace(config, evaluation=replace(config.evaluation, temperature=0.1))
    assert not is_judged(tmp_path, conditions(settings, other), step=6)


def test_cores_of_slots__are_shared_out() -> None:
    assert cores_of_slots(1) == [CORES]
    slots = cores_of_slots(len(CORES) + 1)
    assert len(slots) == len(CORES) + 1 and all(len(cores) == 1 and cores[0] in CORES for cores in slots)
    pairs = cores_of_slots(len(CORES))
    assert sorted(core for cores in pairs for core in cores) == CORES


def test_tied__runs_on_its_cores_and_dies_with_its_starter() -> None:
    inner = (
        f"import os, time; print(os.getpid(), os.sched_getaffinity(0) == {{{CORES[0]}}}, flush=True); time.sleep(60)"
    )
    outer = (
        "import subprocess, time\nfrom maestri.study.tied import tied\n"
        f"subprocess.Popen(tied(['-c', {inner!r}], [{CORES[0]}]))\ntime.sleep(60)"
    )
    starter = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    process, on_core = starter.stdout.readline().split()
    assert on_core == "True" and alive(int(process))
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    deadline = time.monotonic() + 10
    while alive(int(process)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(int(process))


def test_tied__does_not_start_after_its_starter() -> None:
    command = tied(["-c", "print('started')"], CORES)
    command[3] = "1"  # as if the starter had died, and the process were init's
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


def test_seconds_left__starts_as_expected_and_is_not_led_by_the_first_short_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("maestri.study.progress.time.monotonic", lambda: now)
    progress = StudyProgress("runs", works=10, seconds=1000.0, jobs=2, console=Console(file=io.StringIO()))
    assert progress.seconds_left() == pytest.approx(500.0)
    now = 95.0  # a work of 20 s has ended, another of 100 s is nearly done
    progress.ended("short", seconds=20.0)
    assert 480.0 < progress.seconds_left() < 950.0
    for number in range(8):  # at half the pace expected
        now = 100.0 * (number + 2)
        progress.ended("long", seconds=100.0)
    assert progress.seconds_left() == pytest.approx(180.0, rel=0.2)
    baselines = StudyProgress("runs", works=2, seconds=0.0, jobs=2, console=Console(file=io.StringIO()))
    assert baselines.seconds_left() == 0.0
    now += 30.0
    baselines.ended("first")
    assert baselines.seconds_left() == pytest.approx(30.0)
