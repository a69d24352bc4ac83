"""The report of results made by hand: means, deviations, holes, collapse."""

import json
from pathlib import Path
from typing import Any

import pytest

from maestri.study import cli
from maestri.study.config import StudyConfig, load_study
from maestri.study.costs import Cost, Costs, load_costs
from maestri.study.entries import read_entries
from maestri.study.results import SetResult, Spread, gather
from maestri.study.works import JUDGEMENT, conditions, write_failure
from tests.study.small_study import cost, write_study

STUDY = """
out: study
jobs: 2
sets:
  noise:
    budgets: {images: 4800, minutes: 3}
    judging: {k: 3, shots: [1, 2], linear_epochs: 5, train_images: 20}
    entries:
      mae: {seeds: [0, 1, 2], stages: {train: {recipe: mae.yaml}}}
      plmae: {stages: {train: {recipe: plmae.yaml}}}
      chain: {budget: images, stages: {a: {recipe: mae.yaml, share: 0.5}, b: {recipe: plmae.yaml, share: 0.5}}}
"""


def chosen(top1: float, model: str = "student") -> dict[str, Any]:
    return {"model": model, "pooling": "cls", "held_out": top1 + 1, "top1": top1}


def write_run(folder: Path, knn: float, *stages: str, rank_me: float = 9.0, information: float | None = None) -> None:
    """Writes what the report reads of a finished run of 100 steps a stage."""
    study = load_study(Path("study.yaml"))
    wanted = conditions(study.sets["noise"].judging, read_entries(study, open_images=False)[0].stages[-1].config)
    for stage in stages or ("",):
        (folder / stage).mkdir(parents=True)
        told = {} if information is None else {"information_class_student": information, "information_x_teacher": 0.0}
        rows: list[dict[str, Any]] = [
            {"kind": "evaluation", "step": 0, "knn/student/cls/3": 20.0, "knn/student/mean/3": 10.0},
            {"kind": "train", "step": 1, "rank_me": 30.0},
            {"kind": "train", "step": 100, "rank_me": rank_me, **told},
            {"kind": "evaluation", "step": 100, "knn/student/cls/3": knn + 1, "knn/teacher/cls/3": knn - 1},
        ]
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {"knn": chosen(knn), "1-shot": chosen(knn - 30), "2-shot": chosen(knn - 20), "linear": chosen(knn + 5)}
    (folder / JUDGEMENT).write_text(json.dumps({"settings": wanted, "step": 100, "found": found}))


@pytest.fixture
def study(folder: Path) -> StudyConfig:
    """A study of which everything but the run of a seed, and all runs at equal minutes but one, is there."""
    study = load_study(write_study(folder, STUDY))
    entries = read_entries(study, open_images=False)
    images = Path("study/runs/noise/images")
    write_run(images / "mae/seed0", 80.0)
    write_run(images / "mae/seed1", 82.0)
    write_failure(images / "mae/seed2", task="training", exit_code=1, lines=["train.py: out of luck"])
    write_run(images / "plmae/seed0", 40.0, rank_me=1.2, information=0.001)
    write_run(images / "chain/seed0", 70.0, "a", "b", information=0.4)
    write_failure(Path("study/runs/noise/minutes/plmae/seed0"), task="timing", exit_code=1, lines=["no memory"])
    baselines = Path("study/baselines/noise")
    baselines.mkdir(parents=True)
    models = {"random_init": {"knn": chosen(50.0), "1-shot": chosen(20.0)}, "raw_pixels": {"knn": chosen(60.0)}}
    (baselines / JUDGEMENT).write_text(json.dumps({"split": "test", "images": 1000, "models": models}))
    stages = {stage.key: stage for entry in entries for stage in entry.stages}
    of_mae, of_plmae = stages
    costs = Costs(
        hardware={"cpu": "Abacus 3", "cores": "1", "torch": "9.9"},
        stages={of_mae: Cost(**cost(0.6)), of_plmae: Cost(**cost(1.2, teachers=("labelling_teacher",)))},
    )
    costs.save(Path("study/costs.json"))
    return study


def found_in(study: StudyConfig) -> SetResult:
    (found,) = gather(study, read_entries(study, open_images=False), load_costs(Path("study/costs.json")))
    return found


def row_of(text: str, entry: str, section: str) -> list[str]:
    """Returns the cells of an entry's row in a section of the report."""
    part = text.partition(section)[2]
    line = next(line for line in part.splitlines() if line.startswith(f"| {entry} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_spread__over_seeds() -> None:
    assert str(Spread.of([80.0, 82.0])) == "81.00 ± 1.41"
    assert str(Spread.of([80.0])) == "80.00"
    assert Spread.of([]) is None


def test_gather__curves_run_over_stages_in_minutes(study: StudyConfig) -> None:
    chain = found_in(study).cells["images"][2].results[0]
    assert chain.curve == [(0.0, 20.0), (1.0, 20.0), (pytest.approx(3.0), 71.0)]
    assert (chain.steps, chain.rank_me, chain.information) == (200, 9.0, 0.4)


def test_gather__collapse_is_told_by_each_sign(study: StudyConfig) -> None:
    mae, plmae, chain = found_in(study).cells["images"]
    assert mae.results[0].collapsed == "" == chain.results[0].collapsed
    assert plmae.results[0].collapsed == (
        "k-NN 40.0 %, and the untrained network's is surely above 46.8 %, RankMe 1.20, information 0.0010"
    )


def test_gather__holes_have_their_reasons(study: StudyConfig) -> None:
    cells = found_in(study).cells
    assert cells["images"][0].holes == {2: "failed: training: train.py: out of luck"}
    assert [cell.holes for cell in cells["minutes"]] == [
        {0: "not finished", 1: "not finished", 2: "not finished"},
        {0: "failed: timing: no memory"},
    ]


def test_write_report__from_what_is_there(study: StudyConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["study.yaml", "--report-only"]) == 0
    assert capsys.readouterr().out == "study/report.md\n"
    text = Path("study/report.md").read_text()
    assert "maestri study study.yaml" in text and "Abacus 3, 1 core(s) of it a run" in text and "PyTorch 9.9" in text
    assert "### Equal images: 4,800 images seen in training" in text and "### Equal minutes: 3 minutes" in text
    assert "1,000 images: one standard error of a figure near 85 % is 1.13." in text
    images, minutes = "### Equal images", "### Equal minutes"
    mae = row_of(text, "mae", images)
    assert mae[:5] == ["mae", "81.00 ± 1.41", "51.00 ± 1.41", "61.00 ± 1.41", "86.00 ± 1.41"]
    assert mae[5:] == ["student, cls", "9.0", "–", "100", "1.0", "2 of 3", ""]
    plmae = row_of(text, "plmae", images)
    assert plmae[1] == "40.00" and plmae[-1] == "**collapsed** (seed 0)"
    assert row_of(text, "*untrained network*", images)[1:4] == ["50.00", "20.00", "–"]
    assert row_of(text, "plmae", minutes)[1] == "failed" and row_of(text, "mae", minutes)[1] == "–"
    assert row_of(text, "chain", "### What steps cost")[:4] == ["chain", "a", "none", "600.0"]
    assert "- noise, equal images, mae, seed 2: failed: training: train.py: out of luck" in text
    for name in ("noise_entries.png", "noise_shots.png", "noise_minutes.png", "noise_cost.png"):
        assert f"]({name})" in text and (Path("study") / name).read_bytes().startswith(b"\x89PNG")


def test_write_report__json_has_every_figure(study: StudyConfig) -> None:
    assert cli.run(["study.yaml", "--report-only"]) == 0
    plain = json.loads(Path("study/report.json").read_text())
    mae = plain["sets"]["noise"]["comparisons"]["images"]["mae"]
    assert mae["top1"]["knn"] == {"mean": 81.0, "deviation": pytest.approx(2**0.5)}
    assert mae["runs"]["1"]["found"]["knn"]["held_out"] == 83.0
    assert mae["missing"] == {"2": "failed: training: train.py: out of luck"}
    assert plain["sets"]["noise"]["costs"]["plmae/train"]["images_per_second"] == pytest.approx(8 / 1.2)


def test_load_costs__damaged_is_one_line(study: StudyConfig, capsys: pytest.CaptureFixture[str]) -> None:
    Path("study/costs.json").write_text('{"stages": 3}')
    assert cli.run(["study.yaml", "--report-only"]) == 1
    assert "study/costs.json is not what was written" in capsys.readouterr().err


def test_gather__a_judgement_by_other_settings_is_a_hole(study: StudyConfig) -> None:
    path = Path("study/runs/noise/images/mae/seed1") / JUDGEMENT
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"settings": found["settings"] | {"k": 5}}))
    (of_set,) = gather(study, read_entries(study, open_images=False), Costs())
    mae = of_set.cells["images"][0]
    assert mae.holes[1] == "judged by other settings" and list(mae.results) == [0]


def test_write_report__seeds_that_were_evaluated_at_different_steps(study: StudyConfig) -> None:
    path = Path("study/runs/noise/images/mae/seed1/metrics.jsonl")
    more = {"kind": "evaluation", "step": 50, "knn/student/cls/3": 40.0}
    path.write_text("".join(sorted([*path.read_text().splitlines(keepends=True), json.dumps(more) + "\n"])))
    assert cli.run(["study.yaml", "--report-only"]) == 0
