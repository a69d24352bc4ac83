"""A study that is wrong is refused before anything runs, with one line that names the place."""

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from maestri.study import cli
from maestri.study.config import load_study
from maestri.study.entries import read_entries


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs ``maestri study`` with values changed; returns its one line, after a look that nothing was started."""

    def run(**changes: object) -> str:
        study = OmegaConf.load("study.yaml")
        for path, value in changes.items():
            OmegaConf.update(study, path, value, merge=False, force_add=True)
        Path("other.yaml").write_text(OmegaConf.to_yaml(study))
        assert cli.run(["other.yaml"]) == 2
        said = capsys.readouterr()
        assert not Path("study").exists()
        assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("maestri study: other.yaml: ")
        return said.err

    return run


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("out", "", "out is empty"),
        ("jobs", 0, "jobs is 0; it must be at least 1"),
        ("timing.rounds", 0, "timing.rounds is 0"),
        ("sets", {}, "sets is empty"),
        ("sets.noise.budgets.images", 0, "sets.noise.budgets: images and minutes are both 0"),
        ("sets.noise.budgets.images", -1, "sets.noise.budgets.images is -1"),
        ("sets.noise.judging.k", 0, "sets.noise.judging.k is 0"),
        ("sets.noise.judging.k", 60, "sets.noise: evaluation.k asks for 60 neighbours"),
        ("sets.noise.judging.shots", [30], "sets.noise: shots asks for 30 images of each class"),
        ("sets.noise.entries", {}, "sets.noise.entries is empty"),
        ("sets.noise.entries.mae.stages", {}, "sets.noise.entries.mae.stages is empty"),
        ("sets.noise.entries.mae.seeds", [1, 1], "sets.noise.entries.mae.seeds is [1, 1]; give different ones"),
        ("sets.noise.entries.mae.seed", 1, "unknown key 'sets.noise.entries.mae.seed'; did you mean 'sets."),
        ("sets.noise.entries.mae.budget", "minutes", "budget is minutes, but the set's budgets.minutes is 0"),
        ("sets.noise.entries.mae.budget", "steps", "Invalid value 'steps', expected one of"),
        ("sets.noise.entries.mae.stages.train.share", 0.5, "mae.stages: shares sum to 0.5; they must sum to 1"),
        ("sets.noise.entries.mae.stages.train.share", "all", "stages.train.share: Value 'all'"),
        ("sets.noise.entries.mae.stages.train.recipe", "", "stages.train.recipe is empty"),
        ("sets.noise.entries.mae.stages.train.recipe", "may.yaml", "no recipe may.yaml; did you mean 'mae.yaml'?"),
        ("sets.noise.settings", {"data.shards": "nowhere"}, "sets.noise: there is no folder nowhere"),
        ("sets.noise.settings", {"data.holdout": 0}, "sets.noise: data.holdout is 0"),
        ("sets.noise.settings", {"seed": 3}, "seed is among the settings, but the study sets it"),
        ("sets.noise.settings", {"encoder.dept": 3}, "unknown key 'encoder.dept'; did you mean 'encoder.depth'?"),
    ],
)
def test_run__refuses_by_field(refused: Callable[..., str], path: str, value: object, expected: str) -> None:
    assert expected in refused(**{path: value})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method.name": "plmea"}, "method.name: Invalid value 'plmea', expected one of"),
        ({"method.plmae.class_level.balance": "sinkhron"}, "balance: Invalid value 'sinkhron', expected one of"),
        ({"method.plmae.teacher": "one"}, "unknown key 'method.plmae.teacher'; did you mean 'method.plmae.teachers'?"),
        ({"encoder.depth": 3}, "encoder.depth is 2 in entry 'mae' and 3 in entry 'plmae' (stage 'train')"),
        ({"views.size": 40}, "views.size is 32 in entry 'mae' and 40 in entry 'plmae'"),
    ],
)
def test_run__refuses_settings_of_an_entry(
    refused: Callable[..., str], settings: dict[str, object], expected: str
) -> None:
    line = refused(**{"sets.noise.entries.plmae.stages.train.settings": settings})
    assert expected in line and "sets.noise" in line and "plmae" in line


def test_run__refuses_a_half_life_of_no_field(refused: Callable[..., str]) -> None:
    where = "sets.noise.entries.plmae.stages.train.half_lives"
    line = refused(**{where: {"method.plmae.momentum.start": 0.1}})
    assert "plmae.stages.train: half_lives or periods: unknown field 'method.plmae.momentum.start'; did you" in line


def test_run__refuses_names_that_are_no_folders(refused: Callable[..., str]) -> None:
    line = refused(**{"sets.noise.entries": {"a/b": {"stages": {"train": {"recipe": "mae.yaml"}}}}})
    assert "sets.noise.entries: the name 'a/b' must be letters" in line


def test_run__refuses_a_name_given_twice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Path("study.yaml").read_text() + "      mae: {stages: {train: {recipe: plmae.yaml}}}\n"
    Path("other.yaml").write_text(text)
    assert cli.run(["other.yaml"]) == 2
    assert "duplicate key mae" in capsys.readouterr().err


def test_run__says_where_train_py_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["study.yaml", "--program", "nowhere/train.py"]) == 2
    assert "there is no nowhere/train.py; train.py is in a checkout of Maestri" in capsys.readouterr().err


def test_run__report_of_nothing_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["study.yaml", "--report-only"]) == 1
    assert "there is no study in study yet" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(Path(__file__).resolve().parents[2].glob("configs/study_*.yaml")), ids=str)
def test_read_entries__studies_that_come_with_maestri(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parents[1])
    assert len(read_entries(load_study(path), open_images=False)) > 5
