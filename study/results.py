"""What a study has found so far, read from its folder: of each run its accuracies, curve and signs of collapse."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maestri.engine.logs import read_rows
from maestri.evals.report import best_figures
from maestri.evals.sources import RANDOM_INIT, RAW_PIXELS
from maestri.study.config import Budget, StudyConfig
from maestri.study.costs import Cost, Costs
from maestri.study.entries import Entry
from maestri.study.plan import run_folder
from maestri.study.works import JUDGEMENT, baseline_folder, conditions, is_judged, reason_of

BASELINE_NAMES = {RAW_PIXELS: "raw pixels", RANDOM_INIT: "untrained network"}
"""For people."""
LOWEST_RANK = 2.0
"""RankMe of class tokens below which a network is called collapsed; it is 1 where all are alike."""
LOWEST_INFORMATION = 0.01
"""Share of log K below which the student's assignments tell nothing of the image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A figure over seeds."""

    mean: float
    """Over seeds."""
    deviation: float | None
    """Standard deviation over seeds (n − 1); None for one seed."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """Returns that of some values, None of none."""
        if not values:
            return None
        return cls(mean=statistics.fmean(values), deviation=statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.deviation is None else f" ± {self.deviation:.2f}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """A finished run."""

    found: Mapping[str, Mapping[str, Any]]
    """By protocol (``knn``, ``1-shot``, …, ``linear``): what held-out images chose, and ``top1``."""
    curve: Sequence[tuple[float, float]]
    """(minutes of training steps, held-out k-NN accuracy of the best model and pooling among
    ``evaluation.train_images`` neighbours).  Empty where steps were not timed."""
    steps: int
    """Optimizer steps of all stages."""
    rank_me: float | None
    """Of class tokens, at the end."""
    information: float | None
    """The student's lowest, of all levels, at the end; None for a method without assignments."""
    collapsed: str
    """Why it is called collapsed; empty if it is not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """An entry's runs at one budget."""

    entry: Entry
    """Whose."""
    budget: Budget
    """Which."""
    results: Mapping[int, RunResult]
    """Finished runs by seed."""
    holes: Mapping[int, str]
    """Why other seeds have none."""

    def spread(self, protocol: str) -> Spread | None:
        """Returns a protocol's accuracy over seeds."""
        return Spread.of([run.found[protocol]["top1"] for run in self.results.values() if protocol in run.found])


@dataclass(frozen=True, kw_only=True, slots=True)
class SetResult:
    """All of a data set."""

    name: str
    """Its own."""
    cells: Mapping[Budget, Sequence[Cell]]
    """By budget, in the study's order."""
    baselines: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """Model → protocol → as ``RunResult.found``; empty until they are judged."""
    costs: Mapping[tuple[str, str], Cost]
    """(entry, stage) → what its step costs, where that was measured."""
    split: str
    """Where ``top1`` is measured: ``test`` or ``held-out``; empty before anything is judged."""
    images: int
    """Of that split."""


def gather(study: StudyConfig, entries: Sequence[Entry], costs: Costs) -> list[SetResult]:
    """Returns all that the study's folder holds, set by set."""
    found = []
    for name in study.sets:
        of_set = [entry for entry in entries if entry.set_name == name]
        path = baseline_folder(study, name) / JUDGEMENT
        judged = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        baselines = judged.get("models", {})
        budgets = dict.fromkeys(budget for entry in of_set for budget in entry.budgets)
        cells = {
            budget: [
                _cell(study, entry, budget, costs, baselines, judged.get("images", 0))
                for entry in of_set
                if budget in entry.budgets
            ]
            for budget in budgets
        }
        timed = {
            (entry.name, stage.name): costs.stages[stage.key]
            for entry in of_set
            for stage in entry.stages
            if stage.key in costs.stages
        }
        found.append(
            SetResult(
                name=name,
                cells=cells,
                baselines=baselines,
                costs=timed,
                split=judged.get("split", ""),
                images=judged.get("images", 0),
            )
        )
    return found


def _cell(
    study: StudyConfig, entry: Entry, budget: Budget, costs: Costs, baselines: Mapping[str, Any], images: int
) -> Cell:
    results, holes = {}, {}
    for seed in entry.seeds:
        folder = run_folder(Path(study.out), entry.set_name, budget, entry.name, seed)
        reason = reason_of(folder)
        if is_judged(folder, conditions(study.sets[entry.set_name].judging, entry.stages[-1].config)):
            results[seed] = _result(folder, entry, costs, baselines, images)
        elif reason:
            holes[seed] = f"failed: {reason}"
        else:
            holes[seed] = "judged by other settings" if (folder / JUDGEMENT).is_file() else "not finished"
    return Cell(entry=entry, budget=budget, results=results, holes=holes)


def _result(folder: Path, entry: Entry, costs: Costs, baselines: Mapping[str, Any], images: int) -> RunResult:
    found = json.loads((folder / JUDGEMENT).read_text(encoding="utf-8"))["found"]
    curve, minutes, steps = [], 0.0, 0
    timed = all(stage.key in costs.stages for stage in entry.stages)
    monitors: dict[str, float] = {}
    for stage in entry.stages:
        rows = read_rows((folder / stage.name if len(entry.stages) > 1 else folder) / "metrics.jsonl")
        per_step = costs.stages[stage.key].step_seconds / 60 if timed else 0.0
        last = max(row["step"] for row in rows)
        for row in rows:
            if row["kind"] == "train":
                monitors = {name: value for name, value in row.items() if name.startswith(("rank_me", "information_"))}
            elif row["step"] < last or stage is entry.stages[-1]:  # else the next stage begins with the same weights
                best = [row[name] for name in best_figures(row).values()]
                curve.append((minutes + row["step"] * per_step, max(best)))
        minutes, steps = minutes + last * per_step, steps + last
    told = [value for name, value in monitors.items() if name.startswith("information_") and name.endswith("_student")]
    rank_me, information = monitors.get("rank_me"), min(told, default=None)
    untrained = baselines.get(RANDOM_INIT, {}).get("knn", {}).get("top1")
    lowest = None if untrained is None else untrained - 2 * standard_error(untrained, images)
    return RunResult(
        found=found,
        curve=curve if timed else (),
        steps=steps,
        rank_me=rank_me,
        information=information,
        collapsed=_collapse(found["knn"]["top1"], lowest, rank_me, information),
    )


def standard_error(percent: float, images: int) -> float:
    """Returns that of an accuracy in percent on so many images."""
    return math.sqrt(percent * (100 - percent) / images)


def _collapse(knn: float, lowest: float | None, rank_me: float | None, information: float | None) -> str:
    """Returns the signs of a collapse, in words."""
    signs = []
    if lowest is not None and knn < lowest:
        signs.append(f"k-NN {knn:.1f} %, and the untrained network's is surely above {lowest:.1f} %")
    if rank_me is not None and rank_me < LOWEST_RANK:
        signs.append(f"RankMe {rank_me:.2f}")
    if information is not None and information < LOWEST_INFORMATION:
        signs.append(f"information {information:.4f}")
    return ", ".join(signs)
