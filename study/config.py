"""What a study compares: sets of images, on each of them entries, each with its recipe, its seeds and equal budgets."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from maestri.engine.config_files import load

Budget = Literal["images", "minutes"]
"""What all runs of a comparison have equal."""

NAME = re.compile(r"(?!\.+$)[\w.+=-]+")
"""Names are folders' names, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """A recipe, and what is otherwise in this study."""

    recipe: str = ""
    """The YAML file that ``train.py`` is given."""
    share: float = 1.0
    """Share of the entry's budget; those of its stages sum to 1."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Values by ``section.field``, over the recipe's and the set's."""
    half_lives: dict[str, float] = field(default_factory=dict)
    """Fields that are a momentum, each with its half-life as a fraction of the stage's steps."""
    periods: dict[str, float] = field(default_factory=dict)
    """Fields that count optimizer steps, each as a fraction of the stage's; rounded, at least 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryConfig:
    """A row of the comparison."""

    stages: dict[str, StageConfig] = field(default_factory=dict)
    """By name, in their order; each starts from the weights of the one before."""
    seeds: tuple[int, ...] = (0,)
    """A run for each."""
    budget: Literal["both", "images", "minutes"] = "both"
    """The comparisons that it takes part in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetsConfig:
    """What each run may use: one comparison at an equal number of images, one at equal minutes."""

    images: int = 0
    """Images seen in training; 0 = there is no such comparison."""
    minutes: float = 0.0
    """Minutes of training steps, as timed before; 0 = there is no such comparison."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgingConfig:
    """How finished runs are judged; docs/evaluation.md has the protocols."""

    k: int = 20
    """Neighbours that vote in k-NN."""
    shots: tuple[int, ...] = (1, 2, 5)
    """Labelled images of each class in low-shot classification; empty: none."""
    splits: int = 3
    """Of each number of labelled images."""
    train_images: int = 0
    """Training images, the first of ``data.shards``, that are k-NN's neighbours, among which labelled ones are drawn,
    and on which linear probes learn; 0 = all."""
    linear_epochs: int = 0
    """Epochs of linear probes; 0 = there are none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetConfig:
    """A data set, and what is compared on it."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Values by ``section.field`` for all entries, over their recipes."""
    budgets: BudgetsConfig = field(default_factory=BudgetsConfig)
    """What each run may use."""
    judging: JudgingConfig = field(default_factory=JudgingConfig)
    """How runs are judged."""
    evaluations: int = 4
    """Evaluations by k-NN during a run, besides those before its first step and after its last."""
    entries: dict[str, EntryConfig] = field(default_factory=dict)
    """What is compared, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimingConfig:
    """How long a step takes is measured before anything is trained."""

    rounds: int = 5
    """In each of which every stage has its turn."""
    steps: int = 8
    """Optimizer steps of a turn that count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """A study."""

    out: str = ""
    """Folder of the study: runs, costs, report."""
    jobs: int = 1
    """Runs at once, each on its own share of the processor's cores."""
    threads: int = 1
    """torch's threads of a run."""
    timing: TimingConfig = field(default_factory=TimingConfig)
    """How steps are timed."""
    sets: dict[str, SetConfig] = field(default_factory=dict)
    """Data sets by name."""

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("out is empty; name the study's folder")
        if not self.sets:
            raise ValueError("sets is empty; name a data set and its entries")
        least = {"jobs": self.jobs, "threads": self.threads}
        least |= {"timing.rounds": self.timing.rounds, "timing.steps": self.timing.steps}
        for name, value in least.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        for name, of_set in self.sets.items():
            _check_set(f"sets.{name}", of_set)


def load_study(path: Path) -> StudyConfig:
    """Returns a study's configuration.

    Raises:
        ValueError: the file is missing or wrong; one line that names the field.
    """
    return load(StudyConfig, path)


def _check_set(where: str, config: SetConfig) -> None:
    _check_names(where.rpartition(".")[0], [where.rpartition(".")[2]])
    budgets, judging = config.budgets, config.judging
    least: Mapping[str, tuple[float, float]] = {
        "budgets.images": (budgets.images, 0),
        "budgets.minutes": (budgets.minutes, 0),
        "evaluations": (config.evaluations, 0),
        "judging.k": (judging.k, 1),
        "judging.splits": (judging.splits, 1),
        "judging.linear_epochs": (judging.linear_epochs, 0),
        "judging.train_images": (judging.train_images, 0),
        "judging.shots": (min(judging.shots, default=1), 1),
    }
    for name, (value, lowest) in least.items():
        if value < lowest:
            raise ValueError(f"{where}.{name} is {value}; it must be at least {lowest}")
    if not budgets.images and not budgets.minutes:
        raise ValueError(f"{where}.budgets: images and minutes are both 0; set one of them or both")
    if not config.entries:
        raise ValueError(f"{where}.entries is empty; name what is compared")
    _check_names(f"{where}.entries", config.entries)
    for name, entry in config.entries.items():
        _check_entry(f"{where}.entries.{name}", entry, budgets)


def _check_entry(where: str, entry: EntryConfig, budgets: BudgetsConfig) -> None:
    if not entry.stages:
        raise ValueError(f"{where}.stages is empty; give at least one, with its recipe")
    _check_names(f"{where}.stages", entry.stages)
    if not entry.seeds or min(entry.seeds) < 0 or len(set(entry.seeds)) < len(entry.seeds):
        raise ValueError(f"{where}.seeds is {list(entry.seeds)}; give different ones, each at least 0")
    if entry.budget != "both" and not getattr(budgets, entry.budget):
        raise ValueError(f"{where}.budget is {entry.budget}, but the set's budgets.{entry.budget} is 0")
    for name, stage in entry.stages.items():
        if not stage.recipe:
            raise ValueError(f"{where}.stages.{name}.recipe is empty; name a file as in configs/")
        if not 0 < stage.share <= 1:
            raise ValueError(f"{where}.stages.{name}.share is {stage.share}; it must lie in (0, 1]")
        for kind in ("half_lives", "periods"):
            for path, fraction in getattr(stage, kind).items():
                if fraction <= 0:
                    raise ValueError(f"{where}.stages.{name}.{kind}: {path} is {fraction}; it must be above 0")
    total = sum(stage.share for stage in entry.stages.values())
    if abs(total - 1) > 1e-6:
        raise ValueError(f"{where}.stages: shares sum to {total:g}; they must sum to 1")


def _check_names(where: str, names: Any) -> None:
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(f"{where}: the name '{name}' must be letters, digits and . _ + = - only")
