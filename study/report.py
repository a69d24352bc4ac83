"""A study's report: ``report.md`` for people, ``report.json`` for programs, and pictures."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maestri.engine.config_files import commit_of
from maestri.shards.files import write_atomically
from maestri.study.config import Budget, StudyConfig
from maestri.study.costs import Cost, Costs
from maestri.study.entries import EQUAL
from maestri.study.plots import draw, shot_counts
from maestri.study.results import BASELINE_NAMES, Cell, SetResult, Spread, standard_error

NOTHING = "–"
AMOUNTS: Mapping[Budget, str] = {"images": "images seen in training", "minutes": "minutes of training steps"}


def write_report(study: StudyConfig, source: Path, found: Sequence[SetResult], costs: Costs) -> Path:
    """Writes ``report.md``, ``report.json`` and the pictures into the study's folder; returns the first.

    Args:
        study: the study.
        source: its file, for the command.
        found: from ``gather``.
        costs: that were measured.
    """
    out = Path(study.out)
    pictures = {of_set.name: draw(of_set, out) for of_set in found}
    date = time.strftime("%Y-%m-%d %H:%M")
    plain = {
        "command": _command(source),
        "date": date,
        "hardware": costs.hardware,
        "sets": {of_set.name: _plain_set(study, of_set) for of_set in found},
    }
    write_atomically(out / "report.json", (json.dumps(plain, indent=1, ensure_ascii=False) + "\n").encode())
    lines = [*_head(study, source, costs, date)]
    for of_set in found:
        lines += _set_section(study, of_set, [path.name for path in pictures[of_set.name]])
    lines += _holes(found)
    path = out / "report.md"
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    return path


def _command(source: Path) -> str:
    return f"maestri study {source}"


# ------------------------------------------------------------------------------------------------------- Markdown


def _head(study: StudyConfig, source: Path, costs: Costs, date: str) -> Iterator[str]:
    hardware = costs.hardware
    cores, torch = hardware.get("cores", "?"), hardware.get("torch", "?")
    device = f"{hardware['gpu']}, " if "gpu" in hardware else ""
    yield f"# Study {source.stem}"
    yield ""
    yield f"    {_command(source)}"
    yield ""
    yield (
        f"{date}. {device}{hardware.get('cpu', 'processor unknown')}, {cores} core(s) of it a run, {study.jobs} run(s) "
        f"at once, {study.threads} thread(s) of torch each; PyTorch {torch}. Commit "
        f"{commit_of(Path(__file__).resolve().parent) or 'unknown'}."
    )
    yield ""
    yield (
        f"Equal in all stages of a set: {', '.join(f'`{name}`' for name in EQUAL)}. At equal minutes a budget of time "
        "is turned into steps by a step's time, measured before anything was trained, stages in turns, with "
        "nothing else of the study running; it counts training steps only, neither evaluations nor checkpoints nor "
        "starting. Choices of model, pooling and setting are made on held-out training images, by one rule for all."
    )
    yield ""


def _set_section(study: StudyConfig, found: SetResult, pictures: Sequence[str]) -> Iterator[str]:
    yield f"## {found.name}"
    yield ""
    budgets = study.sets[found.name].budgets
    for budget, cells in found.cells.items():
        amount = f"{getattr(budgets, budget):,g}" if budget == "minutes" else f"{budgets.images:,}"
        yield f"### Equal {budget}: {amount} {AMOUNTS[budget]}"
        yield ""
        yield from _accuracies(found, cells)
        yield ""
    yield _protocol(study, found)
    yield ""
    yield "### What steps cost"
    yield ""
    yield from _cost_table(found)
    yield ""
    yield (
        "The median over rounds of a round's mean step, and the lowest and highest round. Memory is the most that the "
        "process had above what libraries take before anything is built; on a GPU the most that torch has allocated."
    )
    yield ""
    for name in pictures:
        yield f"![{name}]({name})"
        yield ""


def _protocol(study: StudyConfig, found: SetResult) -> str:
    judging = study.sets[found.name].judging
    learnt = f"the first {judging.train_images:,} training images" if judging.train_images else "all training images"
    text = (
        f"Top-1 in percent on {found.split or 'held-out'} images: k-NN with k = {judging.k} among {learnt}, "
        f"logistic regression on few labelled images (means over {judging.splits} splits, the same for all)"
    )
    if judging.linear_epochs:
        text += f", linear probes of {judging.linear_epochs} epochs on the same"
    text += (
        ". ± is the standard deviation over seeds, where there are several. RankMe is the effective rank of class "
        "tokens, information the student's lowest mutual information with its prototypes as a share of log K; both are "
        "of the last logged steps, means over seeds."
    )
    if found.images:
        error = standard_error(85, found.images)
        text += f" {found.images:,} images: one standard error of a figure near 85 % is {error:.2f}."
    if found.split == "held-out":
        text += " There are no test images, so figures are of the images that choices were made on, which flatters all."
    return text


def _accuracies(found: SetResult, cells: Sequence[Cell]) -> Iterator[str]:
    kinds = ["knn", *(f"{count}-shot" for count in shot_counts(cells))]
    if any("linear" in run.found for cell in cells for run in cell.results.values()):
        kinds.append("linear")
    heads = ["entry", *("k-NN" if kind == "knn" else kind for kind in kinds)]
    heads += ["chosen for k-NN", "RankMe", "information", "steps", "minutes", "runs", ""]
    yield _row(heads)
    yield _row(["---", *("---:" for _ in kinds), "---", "---:", "---:", "---:", "---:", "---:", "---"])
    for cell in cells:
        yield _row(_accuracy_cells(found, cell, kinds))
    for name, of_model in found.baselines.items():
        figures = [f"{of_model[kind]['top1']:.2f}" if kind in of_model else NOTHING for kind in kinds]
        yield _row([f"*{BASELINE_NAMES[name]}*", *figures, of_model["knn"]["pooling"], *[NOTHING] * 5, ""])


def _accuracy_cells(found: SetResult, cell: Cell, kinds: Sequence[str]) -> list[str]:
    runs = list(cell.results.values())
    hole = "failed" if any(text.startswith("failed") for text in cell.holes.values()) else NOTHING
    figures = [str(spread) if (spread := cell.spread(kind)) else hole for kind in kinds]
    chosen = dict.fromkeys(f"{run.found['knn']['model']}, {run.found['knn']['pooling']}" for run in runs)
    ranks = Spread.of([run.rank_me for run in runs if run.rank_me is not None])
    told = Spread.of([run.information for run in runs if run.information is not None])
    minutes = Spread.of([run.curve[-1][0] for run in runs if run.curve])
    collapsed = [f"seed {seed}" for seed, run in cell.results.items() if run.collapsed]
    count = f"{len(runs)}" if not cell.holes else f"{len(runs)} of {len(runs) + len(cell.holes)}"
    return [
        cell.entry.name,
        *figures,
        "; ".join(chosen) or NOTHING,
        f"{ranks.mean:.1f}" if ranks else NOTHING,
        f"{told.mean:.2f}" if told else NOTHING,
        f"{runs[0].steps:,}" if runs else NOTHING,
        f"{minutes.mean:.1f}" if minutes else NOTHING,
        count,
        f"**collapsed** ({', '.join(collapsed)})" if collapsed else "",
    ]


def _cost_table(found: SetResult) -> Iterator[str]:
    yield _row(["entry", "stage", "teachers", "ms a step", "rounds, ms", "images a step", "images/s", "memory, MB"])
    yield _row(["---", "---", "---", "---:", "---:", "---:", "---:", "---:"])
    for (entry, stage), cost in found.costs.items():
        rounds = [1e3 * seconds for seconds in cost.rounds]
        yield _row(
            [
                entry,
                stage,
                ", ".join(cost.teachers).replace("_", " ") or "none",
                f"{1e3 * cost.step_seconds:,.1f}",
                f"{min(rounds):,.1f} to {max(rounds):,.1f}",
                f"{cost.images:,}",
                f"{cost.images_per_second:,.0f}",
                f"{cost.peak_bytes / 1e6:,.0f}",
            ]
        )


def _holes(found: Sequence[SetResult]) -> Iterator[str]:
    cells = [cell for of_set in found for of_budget in of_set.cells.values() for cell in of_budget]
    missing = [(cell, seed, text) for cell in cells for seed, text in cell.holes.items()]
    if missing:
        yield "## Missing"
        yield ""
        for cell, seed, text in missing:
            yield f"- {_name(cell)}, seed {seed}: {text}"
        yield ""
    collapsed = [(cell, seed, run.collapsed) for cell in cells for seed, run in cell.results.items() if run.collapsed]
    if collapsed:
        yield "## Collapsed"
        yield ""
        for cell, seed, text in collapsed:
            yield f"- {_name(cell)}, seed {seed}: {text}"
        yield ""


def _name(cell: Cell) -> str:
    return f"{cell.entry.set_name}, equal {cell.budget}, {cell.entry.name}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


# ----------------------------------------------------------------------------------------------------------- JSON


def _plain_set(study: StudyConfig, found: SetResult) -> dict[str, Any]:
    return {
        "budgets": asdict(study.sets[found.name].budgets),
        "split": found.split,
        "images": found.images,
        "baselines": found.baselines,
        "comparisons": {
            budget: {cell.entry.name: _plain_cell(cell) for cell in cells} for budget, cells in found.cells.items()
        },
        "costs": {f"{entry}/{stage}": _plain_cost(cost) for (entry, stage), cost in found.costs.items()},
    }


def _plain_cost(cost: Cost) -> dict[str, Any]:
    return {**asdict(cost), "images_per_second": cost.images_per_second}


def _plain_cell(cell: Cell) -> dict[str, Any]:
    kinds = dict.fromkeys(kind for run in cell.results.values() for kind in run.found)
    spreads = {kind: spread for kind in kinds if (spread := cell.spread(kind))}
    return {
        "top1": {kind: asdict(spread) for kind, spread in spreads.items()},
        "runs": {str(seed): asdict(run) for seed, run in cell.results.items()},
        "missing": {str(seed): text for seed, text in cell.holes.items()},
    }
