"""A whole study, run for real on small images: resumed, with a run that fails, killed and run again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maestri.engine.config import as_plain
from maestri.engine.logs import read_rows
from maestri.study import cli, runner
from maestri.study.config import load_study
from maestri.study.costs import Cost, Costs
from maestri.study.entries import read_entries
from maestri.study.works import FAILURE, JUDGEMENT
from tests.study.small_study import STUDY, cost, write_study

pytestmark = pytest.mark.long

MAESTRI = Path(sys.executable).with_name("maestri")
BROKEN = "      broken: {stages: {train: {recipe: mae.yaml, settings: {initial.file: nowhere.safetensors}}}}\n"
PLMAE_ENTRY = "      plmae: {stages: {train: {recipe: plmae.yaml}}}\n"
RUNS = Path("study/runs/noise/images")
LOG = RUNS / "mae/seed0/metrics.jsonl"


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What runs have started: of each process its folder's name and what it does."""
    found = []
    tied = runner.tied

    def told(command: tuple[str, ...], cores: list[int]) -> list[str]:
        path = Path(command[2] if command[0] == "-m" else command[1])
        found.append(f"{path.name} {command[1].rpartition('.')[2]}" if command[0] == "-m" else path.parts[-3])
        return tied(command, cores)

    monkeypatch.setattr(runner, "tied", told)
    return found


def test_study__runs_goes_on_after_a_failure_and_runs_nothing_twice(
    folder: Path, starts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(folder, STUDY.replace(PLMAE_ENTRY, BROKEN))
    assert cli.run(["study.yaml"]) == 1
    said = capsys.readouterr()
    assert "timing the steps of 1 stages" in said.out, "both entries have the same step"
    assert said.err == "maestri study: 1 runs failed; study/report.md says why, the same command tries them again\n"
    assert sorted(starts) == ["broken", "mae", "noise judge", "seed0 judge"]
    record = json.loads((RUNS / "broken/seed0" / FAILURE).read_text())
    assert record["task"] == "training" and "nowhere.safetensors" in record["lines"][-1]
    text = Path("study/report.md").read_text()
    assert "| broken | failed | failed |" in text and "broken, seed 0: failed: training: train.py: " in text
    found = json.loads((RUNS / "mae/seed0" / JUDGEMENT).read_text())
    (timed,) = json.loads(Path("study/costs.json").read_text())["stages"].values()
    assert 0 < timed["step_seconds"] < 10 and timed["images"] == 8 and timed["peak_bytes"] > 0
    assert set(found["found"]) == {"knn", "1-shot"} and found["step"] == 6 and found["split"] == "held-out"

    # What failed is tried again, what is done is not; with the cause away, the study is complete.
    starts.clear()
    assert cli.run(["study.yaml"]) == 1
    assert starts == ["broken"]
    starts.clear()
    write_study(folder, STUDY.replace(PLMAE_ENTRY, ""))
    assert cli.run(["study.yaml"]) == 0
    assert starts == []
    assert "2 of 2 runs and baselines are done" in capsys.readouterr().out
    assert "failed" not in Path("study/report.md").read_text()

    # Another budget in the same folder is an error before anything is started.
    write_study(folder, Path("study.yaml").read_text().replace("images: 48", "images: 80"))
    assert cli.run(["study.yaml"]) == 2
    assert "mae/seed0 holds a run with other settings: steps (6 → 10)" in capsys.readouterr().err
    assert starts == []


def trainings() -> list[int]:
    """Returns the ids of processes that train in this test's folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            if any(word.endswith(b"train.py") for word in words) and (path / "cwd").resolve() == Path.cwd():
                found.append(int(path.name))
        except OSError:
            continue  # it ended meanwhile
    return found


def start(*, until_rows: int) -> "subprocess.Popen[str]":
    """Starts the study, and returns it once its training has so many rows."""
    study = subprocess.Popen([MAESTRI, "study", "study.yaml"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(read_rows(LOG)) < until_rows:
        assert study.poll() is None and time.monotonic() < deadline, "it ended, or nothing came"
        time.sleep(0.02)
    return study


def test_study__killed_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL ends its training with it, which goes on from a checkpoint; no row is written twice."""
    path = write_study(folder, STUDY.replace(PLMAE_ENTRY, "").replace("images: 48", "images: 1200"))
    study = load_study(path)
    (stage,) = read_entries(study)[0].stages
    baselines = Path("study/baselines/noise")
    baselines.mkdir(parents=True)
    judged = {"step": 0, "settings": as_plain(study.sets["noise"].judging), "models": {}}
    (baselines / JUDGEMENT).write_text(json.dumps(judged))
    Costs(stages={stage.key: Cost(**cost(0.02))}).save(Path("study/costs.json"))

    first = start(until_rows=60)
    first.kill()
    first.communicate()
    deadline = time.monotonic() + 20
    while trainings() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert trainings() == []

    assert cli.run([str(path)]) == 0
    assert "timing" not in capsys.readouterr().out, "steps are timed once"
    assert f"continuing {LOG.parent} after step" in (LOG.parent / "training.txt").read_text()
    steps = [row["step"] for row in read_rows(LOG) if row["kind"] == "train"]
    assert steps == list(range(1, 151))


def test_study__interrupted_says_how_to_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal comes first")

    monkeypatch.setattr(cli, "_timed", lambda *arguments: Costs())
    monkeypatch.setattr(cli, "_run", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.run(["study.yaml"]) == 75
    assert signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr().err == "maestri study: interrupted; 'maestri study study.yaml' goes on from here\n"
    assert Path("study/report.md").read_text().count(": not finished") == 2
