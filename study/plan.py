"""The runs of a study: budgets turned into steps, and each run's own configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from maestri.engine.config import RunConfig
from maestri.engine.config_files import load_config
from maestri.study.config import Budget, StudyConfig
from maestri.study.entries import Entry, Stage, scaled_settings, settings_of

CHECKPOINTS = 4
"""Of a stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run of an entry, in all its stages."""

    entry: Entry
    """Whose."""
    budget: Budget
    """The comparison it is in."""
    seed: int
    """Its own."""
    configs: tuple[RunConfig, ...]
    """Of its stages, in their order."""
    seconds: float
    """That its steps will take, as they were timed; nan where they were not."""

    @property
    def folder(self) -> Path:
        """Where its stages and its judgement lie."""
        out = Path(self.configs[-1].out)
        return out.parent if len(self.configs) > 1 else out

    @property
    def label(self) -> str:
        """Its name for people."""
        return f"{self.entry.set_name}, {self.budget}: {self.entry.name}, seed {self.seed}"


def steps_of(stage: Stage, budget: Budget, amount: float, step_seconds: float) -> int:
    """Returns the optimizer steps of a stage.

    Args:
        stage: its share of the entry's budget counts.
        budget: what is equal.
        amount: images, or minutes.
        step_seconds: as timed; only read for minutes.
    """
    of_stage = amount * stage.given.share
    exact = of_stage / stage.config.batch.global_size if budget == "images" else 60 * of_stage / step_seconds
    return max(1, round(exact))


def runs_of(study: StudyConfig, entries: Sequence[Entry], step_seconds: Mapping[str, float]) -> list[Run]:
    """Returns all runs, those of all entries' first seeds before any second one.

    Args:
        study: the study.
        entries: from ``read_entries``.
        step_seconds: by a stage's key; entries with a stage that has none are left out.

    Raises:
        ValueError: a recipe does not allow the number of steps that the budget gives it.
    """
    found: list[tuple[int, Run]] = []
    for entry in entries:
        if any(stage.key not in step_seconds for stage in entry.stages):
            continue
        for budget, amount in entry.budgets.items():
            steps = [steps_of(stage, budget, amount, step_seconds[stage.key]) for stage in entry.stages]
            seconds = sum(count * step_seconds[stage.key] for count, stage in zip(steps, entry.stages, strict=True))
            sized = _sized(study, entry, steps)
            for number, seed in enumerate(entry.seeds):
                folder = run_folder(Path(study.out), entry.set_name, budget, entry.name, seed)
                configs = _placed(sized, entry, folder, seed)
                found.append((number, Run(entry=entry, budget=budget, seed=seed, configs=configs, seconds=seconds)))
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def run_folder(out: Path, set_name: str, budget: Budget, entry: str, seed: int) -> Path:
    """Returns the folder of a run."""
    return out / "runs" / set_name / budget / entry / f"seed{seed}"


def _sized(study: StudyConfig, entry: Entry, steps: Sequence[int]) -> list[RunConfig]:
    """Returns the configurations of an entry's stages with so many steps each."""
    of_set = study.sets[entry.set_name]
    configs = []
    for stage, count in zip(entry.stages, steps, strict=True):
        evaluations = round(of_set.evaluations * stage.given.share)
        settings = settings_of(study, of_set, stage.given) | {
            "steps": count,
            "checkpoint.every": -(-count // CHECKPOINTS),
            "checkpoint.keep": 1,
            "evaluation.every": -(-count // (evaluations + 1)) if evaluations else 0,
        }
        settings |= scaled_settings(stage.given, steps=count)
        try:
            configs.append(load_config(stage.given.recipe, settings=settings))
        except ValueError as error:
            where = f"sets.{entry.set_name}.entries.{entry.name}.stages.{stage.name}"
            raise ValueError(f"{where}, {count} steps: {error}") from None
    return configs


def _placed(configs: Sequence[RunConfig], entry: Entry, folder: Path, seed: int) -> tuple[RunConfig, ...]:
    """Returns the same as those of a run, each stage going on from the one before."""
    placed: list[RunConfig] = []
    for stage, config in zip(entry.stages, configs, strict=True):
        out = folder / stage.name if len(entry.stages) > 1 else folder
        initial = replace(config.initial, run=placed[-1].out, file="") if placed else config.initial
        placed.append(replace(config, out=str(out), seed=seed, initial=initial))
    return tuple(placed)
