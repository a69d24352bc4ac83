"""The entries of a study: their recipes read, and checked before anything runs."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from maestri.engine.config import RunConfig, as_plain
from maestri.engine.config_files import did_you_mean, field_paths, load_config
from maestri.evals.judging import check_settings
from maestri.evals.lowshot import LowshotSettings
from maestri.evals.run import check_images
from maestri.evals.sets import Splits, read_labels
from maestri.study.config import Budget, JudgingConfig, SetConfig, StageConfig, StudyConfig

EQUAL = (
    "encoder",
    "views.size",
    "data.shards",
    "data.test_shards",
    "data.holdout",
    "data.select",
    "engine.precision",
    "evaluation.crop_fraction",
    "evaluation.temperature",
)
"""What all stages of a set must have alike; of the encoder, ``drop_path`` may differ, which is the training's."""
UNTIMED = ("out", "resume", "seed", "steps", "initial", "checkpoint", "evaluation", "logging")
"""What a step's time does not depend on."""
OWN = (
    "out",
    "resume",
    "seed",
    "steps",
    "engine.threads",
    "checkpoint.every",
    "checkpoint.keep",
    "evaluation.every",
    "evaluation.k",
    "evaluation.baselines",
)
"""Fields that the study sets itself."""
KNOWN = tuple(field_paths(RunConfig))
"""Fields of a recipe."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of an entry, as its recipe and the study have it; ``config`` lacks what is each run's own."""

    name: str
    """In its entry."""
    given: StageConfig
    """The study's words."""
    config: RunConfig
    """With the recipe's steps and seed."""

    @cached_property
    def key(self) -> str:
        """A digest of all that a step's time depends on: stages that are alike are timed once."""
        plain = as_plain(self.config)
        del plain["method"]  # but for the section in use
        plain = {name: value for name, value in plain.items() if name not in UNTIMED}
        method = self.config.method
        plain["method"] = [method.name, as_plain(getattr(method, method.name))]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A row of the comparison."""

    set_name: str
    """Its data set."""
    name: str
    """Its own."""
    stages: tuple[Stage, ...]
    """In their order."""
    seeds: tuple[int, ...]
    """Of its runs."""
    budgets: Mapping[Budget, float]
    """What each of its runs may use."""


def read_entries(study: StudyConfig, *, open_images: bool = True) -> list[Entry]:
    """Returns all entries, with their recipes read.

    Args:
        study: the study.
        open_images: whether every set is opened, and its images counted.

    Raises:
        ValueError: a recipe, a field or a data set is missing or wrong, or entries of a set are not comparable; one
            line that names the entry.
        OSError: a data set cannot be read.
    """
    entries = []
    for set_name, of_set in study.sets.items():
        of_this = [_read_entry(study, set_name, name) for name in of_set.entries]
        _check_equal(of_this)
        if open_images:
            _check_images(f"sets.{set_name}", of_this[0].stages[0].config, of_set.judging)
        entries += of_this
    return entries


def _read_entry(study: StudyConfig, set_name: str, name: str) -> Entry:
    of_set = study.sets[set_name]
    entry = of_set.entries[name]
    stages = []
    for stage_name, given in entry.stages.items():
        where = f"sets.{set_name}.entries.{name}.stages.{stage_name}"
        if not Path(given.recipe).is_file():
            near = did_you_mean(given.recipe, [str(path) for path in Path(given.recipe).parent.glob("*.yaml")])
            raise ValueError(f"{where}: there is no recipe {given.recipe}{near}")
        own = sorted(path for path in flat({**of_set.settings, **given.settings}) if path.startswith(OWN))
        if own:
            raise ValueError(f"{where}: {own[0]} is among the settings, but the study sets it by its own fields")
        try:
            for path in scaled_settings(given, steps=1):
                if path not in KNOWN:
                    raise ValueError(f"half_lives or periods: unknown field '{path}'{did_you_mean(path, KNOWN)}")
            config = load_config(given.recipe, settings=settings_of(study, of_set, given))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        stages.append(Stage(name=stage_name, given=given, config=config))
    budgets: dict[Budget, float] = {}
    if entry.budget != "minutes" and of_set.budgets.images:
        budgets["images"] = of_set.budgets.images
    if entry.budget != "images" and of_set.budgets.minutes:
        budgets["minutes"] = of_set.budgets.minutes
    return Entry(set_name=set_name, name=name, stages=tuple(stages), seeds=entry.seeds, budgets=budgets)


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the ``section.field`` of each value, however a section is written."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def settings_of(study: StudyConfig, of_set: SetConfig, given: StageConfig) -> dict[str, Any]:
    """Returns what a study sets over a recipe for each of a stage's runs."""
    ours: dict[str, Any] = {
        "engine.threads": study.threads,
        "evaluation.baselines": False,
        "evaluation.full_at_end": False,
        "logging.tensorboard": False,
    }
    ours["evaluation.k"] = [of_set.judging.k]
    return {**ours, **of_set.settings, **given.settings}


def _check_equal(entries: Sequence[Entry]) -> None:
    first = as_plain(entries[0].stages[0].config)
    for entry in entries:
        for stage in entry.stages:
            plain = as_plain(stage.config)
            for name in EQUAL:
                for path, was, now in _differences(name, _field(first, name), _field(plain, name)):
                    raise ValueError(
                        f"sets.{entry.set_name}: {path} is {was} in entry '{entries[0].name}' and {now} in entry "
                        f"'{entry.name}' (stage '{stage.name}'); a comparison needs it equal"
                    )


def _differences(path: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(was, dict):
        for name in was:
            if f"{path}.{name}" != "encoder.drop_path":
                yield from _differences(f"{path}.{name}", was[name], now[name])
    elif was != now:
        yield path, was, now


def _field(plain: Mapping[str, Any], path: str) -> Any:
    found: Any = plain
    for name in path.split("."):
        found = found[name]
    return found


def _check_images(where: str, config: RunConfig, judging: JudgingConfig) -> None:
    """Checks that a set's images are there, and enough to judge by."""
    splits = splits_of(config, max_train=judging.train_images)
    try:
        if not config.data.holdout:
            raise ValueError("data.holdout is 0; models and poolings are chosen on held-out images: hold some out")
        check_images(config)
        if judging.shots:
            labelled = read_labels(splits, device=torch.device("cpu"))
            check_settings(lowshot_settings(judging), labelled, shards=splits.shards, seed=0)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def splits_of(config: RunConfig, *, max_train: int) -> Splits:
    """Returns the images that a run is judged on: all held-out and test images; ``max_train`` 0 = all training ones."""
    return Splits(
        shards=Path(config.data.shards),
        holdout=config.data.holdout,
        test_shards=Path(config.data.test_shards) if config.data.test_shards else None,
        max_train=max_train,
    )


def lowshot_settings(judging: JudgingConfig) -> LowshotSettings:
    """Returns the settings of low-shot classification."""
    return LowshotSettings(shots=judging.shots, percent=0.0, splits=judging.splits)


def scaled_settings(given: StageConfig, *, steps: int) -> dict[str, Any]:
    """Returns the settings that a stage states as fractions of its steps."""
    momenta = {path: momentum(part * steps) for path, part in given.half_lives.items()}
    return {**momenta, **{path: max(1, round(part * steps)) for path, part in given.periods.items()}}


def momentum(half_life: float) -> float:
    """Returns the momentum of a half-life in steps; 0 for one below log 2."""
    return max(0.0, 1.0 - math.log(2) / half_life)
