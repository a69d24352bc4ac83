"""What a user reads of an evaluation: a table, a summary for JSON, and a plot of the run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from maestri.engine.logs import last_with_loss
from maestri.evals.protocol import AccuracyReport, ClusterReport, KnnReport, LowshotReport
from maestri.evals.sheets import accuracy_sheet
from maestri.evals.sources import BASELINES

LOSS_PREFIXES = ("loss", "me_max")


def figures(report: KnnReport) -> dict[str, float]:
    """Returns held-out accuracies as flat metrics, ``knn/<model>/<pooling>/<k>``, in percent."""
    return {
        f"knn/{model}/{pooling}/{k}": value
        for model, table in report.holdout.items()
        for pooling, row in table.items()
        for k, value in row.items()
    }


def summary(report: KnnReport) -> dict[str, Any]:
    """Returns the part of ``summary.json`` that evaluation knows: what was chosen, and everything measured."""
    return accuracy_summary(report)


def table(report: KnnReport) -> Table:
    """Returns every accuracy as a table; the choice of each model is marked."""
    return accuracy_sheet(report, "k-NN top-1, %").as_table()


def accuracy_summary(report: AccuracyReport) -> dict[str, Any]:
    """Returns what was chosen on which images, the accuracies there, and everything measured."""
    chosen = {}
    for model in report.test or report.holdout:
        pooling, setting = report.choice(model)
        chosen[model] = {"pooling": pooling, report.setting: setting, "top1": report.chosen(model)}
    return {
        "split": "test" if report.test else "holdout",
        "chosen_on": "holdout" if report.holdout else "test",
        "best_model": report.best(learnt(report)),
        "top1": chosen,
        "all": report.as_plain(),
    }


def lowshot_summary(report: LowshotReport) -> dict[str, Any]:
    """Returns the like for each kind of split; the best model is that of the first kind."""
    kinds = {kind: accuracy_summary(of_kind) for kind, of_kind in report.items()}
    for kind, of_kind in report.items():
        deviations = of_kind.test_deviation or of_kind.holdout_deviation
        for model, entry in kinds[kind]["top1"].items():
            entry["deviation"] = deviations[model][entry["pooling"]][entry["C"]]
    first = next(iter(kinds.values()))
    return {
        "split": first["split"],
        "chosen_on": first["chosen_on"],
        "best_model": first["best_model"],
        "num_images": {kind: list(of_kind.num_images) for kind, of_kind in report.items()},
        "top1": {kind: of_kind["top1"] for kind, of_kind in kinds.items()},
        "all": {kind: of_kind["all"] for kind, of_kind in kinds.items()},
        "deviations": {
            kind: replace(of_kind, holdout=of_kind.holdout_deviation, test=of_kind.test_deviation).as_plain()
            for kind, of_kind in report.items()
        },
    }


def cluster_summary(report: ClusterReport) -> dict[str, Any]:
    """Returns the chosen pooling's Hungarian accuracies, and every measure as mean, deviation and lowest inertia's."""
    measured = {"holdout": report.holdout_measures, "test": report.test_measures}
    found = {
        split: {
            model: {
                pooling: {name: asdict(spread) for name, spread in measures.items()}
                for pooling, measures in of_model.items()
            }
            for model, of_model in spreads.items()
        }
        for split, spreads in measured.items()
    }
    return {**accuracy_summary(report), "all": found}


def learnt(report: AccuracyReport) -> tuple[str, ...]:
    """Returns the models that are no baseline (all, if there is nothing else)."""
    models = tuple(report.test or report.holdout)
    return tuple(model for model in models if model not in BASELINES) or models


def plot_run(rows: Sequence[Mapping[str, Any]], path: Path, *, full_at_end: bool = True) -> None:
    """Draws losses and held-out k-NN accuracies of ``metrics.jsonl``'s rows over optimizer steps into a PNG.

    Each model is drawn at the pooling and k that are best at the end; raw pixels and the untrained network, known at
    the end only, are horizontal lines.

    Args:
        rows: as ``engine.logs.read_rows`` returns them.
        path: of the PNG.
        full_at_end: whether the last evaluation had all neighbours.
    """
    from matplotlib.figure import Figure

    train = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in [key for key in last_with_loss(train) if key.startswith(LOSS_PREFIXES)]:
        left.plot([row["step"] for row in train], [row.get(name) for row in train], label=name, linewidth=1.2)
    left.set(xlabel="optimizer step", ylabel="loss (nats)", title="Losses")
    for model, name in best_figures(evaluations[-1] if evaluations else {}).items():
        points = [(row["step"], row[name]) for row in evaluations if name in row]
        label = name.removeprefix("knn/").replace("/", ", ")
        if model in BASELINES:
            value = points[-1][1]
            right.axhline(value, linestyle="--", linewidth=1, color="grey")
            right.annotate(label, (0, value), textcoords="offset points", xytext=(4, 3), fontsize=7, color="grey")
        else:
            right.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=label)
    title = "k-NN on held-out images" + (" (last point: all neighbours)" if full_at_end else "")
    right.set(xlabel="optimizer step", ylabel="top-1 (%)", title=title)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def best_figures(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns, by model, the name of its best ``knn/…`` figure in an evaluation's row."""
    best: dict[str, str] = {}
    for name, value in row.items():
        if not name.startswith("knn/"):
            continue
        model = name.split("/")[1]
        if model not in best or value > row[best[model]]:
            best[model] = name
    return best
