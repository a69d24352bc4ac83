"""Budgets turned into steps, and the runs that a study has."""

from dataclasses import replace
from pathlib import Path

import pytest

from maestri.study.config import Budget, StageConfig, StudyConfig, load_study
from maestri.study.costs import Cost, Costs, untimed
from maestri.study.entries import Stage, momentum, read_entries
from maestri.study.plan import Run, run_folder, runs_of, steps_of
from tests.study.small_study import cost, write_study

TWO_STAGES = """
out: study
sets:
  noise:
    budgets: {images: 240, minutes: 2}
    judging: {k: 3, shots: [1]}
    evaluations: 3
    settings: {data.max_bad: 7}
    entries:
      mae: {seeds: [0, 4], stages: {train: {recipe: mae.yaml}}}
      plmae:
        budget: images
        stages:
          first: {recipe: mae.yaml, share: 0.6}
          second:
            recipe: plmae.yaml
            share: 0.4
            settings: {method.plmae.teachers: one}
            half_lives: {method.plmae.labelling_momentum.start: 0.25}
            periods: {data.prefetch: 0.5}
"""


@pytest.fixture
def study(folder: Path) -> StudyConfig:
    return load_study(write_study(folder, TWO_STAGES))


def runs(study: StudyConfig, seconds: float = 0.5) -> dict[str, Run]:
    """Returns the study's runs by label, every stage's step taking so long."""
    entries = read_entries(study)
    known = {stage.key: seconds for entry in entries for stage in entry.stages}
    return {run.label: run for run in runs_of(study, entries, known)}


def stage_of(study: StudyConfig, share: float) -> Stage:
    first = read_entries(study, open_images=False)[0].stages[0]
    return Stage(name="train", given=StageConfig(recipe="mae.yaml", share=share), config=first.config)


@pytest.mark.parametrize(
    ("budget", "amount", "share", "step_seconds", "expected"),
    [
        ("images", 240, 1.0, 0.5, 30),
        ("images", 244, 1.0, 0.5, 30),  # rounded: 30.5 to the even one
        ("images", 240, 0.1, 0.5, 3),
        ("images", 1, 0.1, 0.5, 1),
        ("minutes", 2, 1.0, 0.5, 240),
        ("minutes", 2, 0.25, 0.125, 240),
        ("minutes", 0.001, 1.0, 0.5, 1),
    ],
)
def test_steps_of(
    study: StudyConfig, budget: Budget, amount: float, share: float, step_seconds: float, expected: int
) -> None:
    assert steps_of(stage_of(study, share), budget, amount, step_seconds) == expected


def test_momentum__halves_after_its_half_life() -> None:
    assert momentum(100) ** 100 == pytest.approx(0.5, rel=5e-3)
    assert momentum(0.1) == 0.0


def test_runs_of__each_budget_and_seed_first_seeds_first(study: StudyConfig) -> None:
    found = runs(study)
    assert list(found) == [
        "noise, images: mae, seed 0",
        "noise, minutes: mae, seed 0",
        "noise, images: plmae, seed 0",
        "noise, images: mae, seed 4",
        "noise, minutes: mae, seed 4",
    ]
    run = found["noise, minutes: mae, seed 4"]
    (config,) = run.configs
    assert run.folder == Path("study/runs/noise/minutes/mae/seed4") == Path(config.out)
    assert run.folder == run_folder(Path("study"), "noise", "minutes", "mae", 4)
    assert (config.seed, config.steps, config.data.max_bad, config.engine.threads) == (4, 240, 7, 1)
    assert (config.evaluation.every, config.evaluation.k, config.checkpoint.every) == (60, (3,), 60)
    assert run.seconds == pytest.approx(120)


def test_runs_of__stages_share_a_budget_and_start_from_each_other(study: StudyConfig) -> None:
    run = runs(study)["noise, images: plmae, seed 0"]
    first, second = run.configs
    assert (first.steps, second.steps) == (18, 12)
    assert Path(second.initial.run) == Path(first.out) == run.folder / "first"
    assert Path(second.out) == run.folder / "second"
    assert second.method.plmae.teachers == "one"
    assert second.method.plmae.labelling_momentum.start == momentum(3)
    assert second.data.prefetch == 6
    assert run.seconds == pytest.approx(15)


def test_runs_of__an_entry_that_was_not_timed_is_left_out(study: StudyConfig) -> None:
    entries = read_entries(study)
    found = runs_of(study, entries, {entries[0].stages[0].key: 0.5})
    assert {run.entry.name for run in found} == {"mae"}


def test_untimed__stages_of_equal_steps_once(study: StudyConfig) -> None:
    """A stage's share, seed and evaluations leave its step as it is; another method does not."""
    entries = read_entries(study)
    ((first, second),) = untimed(entries, Costs())
    assert first.key == entries[0].stages[0].key == entries[1].stages[0].key
    assert second.key == entries[1].stages[1].key != first.key
    ((left,),) = untimed(entries, Costs(stages={first.key: Cost(**cost())}))
    assert left.key == second.key
    larger = replace(second, config=replace(second.config, batch=replace(second.config.batch, global_size=16)))
    assert larger.key != second.key
