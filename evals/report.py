"""What a user reads of an evaluation: a table, a summary for JSON, and a plot of the run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from maestri.evals.protocol import KnnReport
from maestri.evals.run import RANDOM_INIT, RAW_PIXELS

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
    chosen = {}
    for model in report.test or report.holdout:
        pooling, k = report.choice(model)
        chosen[model] = {"pooling": pooling, "k": k, "top1": report.chosen(model)}
    learnt = tuple(model for model in chosen if model not in (RAW_PIXELS, RANDOM_INIT))
    return {
        "split": "test" if report.test else "holdout",
        "chosen_on": "holdout" if report.holdout else "test",
        "best_model": report.best(learnt),
        "top1": chosen,
        "all": report.as_plain(),
    }


def table(report: KnnReport) -> Table:
    """Returns every accuracy as a table; the choice of each model is marked."""
    rendered = Table(title="k-NN top-1, %", caption="▸ pooling and k chosen on held-out training images")
    for column, justify in (("model", "left"), ("pooling", "left"), ("k", "right")):
        rendered.add_column(column, justify="right" if justify == "right" else "left")
    rendered.add_column("held-out", justify="right")
    rendered.add_column("test", justify="right")
    for model, rows in (report.test or report.holdout).items():
        for pooling, row in rows.items():
            for k in row:
                mark = "▸ " if report.choice(model) == (pooling, k) else "  "
                cells = [_cell(split, model, pooling, k) for split in (report.holdout, report.test)]
                rendered.add_row(mark + model, pooling, str(k), *cells)
    return rendered


def _cell(split: Mapping[str, Any], model: str, pooling: str, k: int) -> str:
    return f"{split[model][pooling][k]:.2f}" if model in split else "–"


def plot_run(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws losses and held-out k-NN accuracies of ``metrics.jsonl``'s rows over optimizer steps into a PNG.

    Each model is drawn at the pooling and k that are best at the end; raw pixels and the untrained network, known at
    the end only, are horizontal lines.

    Args:
        rows: as ``engine.logs.read_rows`` returns them.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    train = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in [key for key in (train[-1] if train else {}) if key.startswith(LOSS_PREFIXES)]:
        left.plot([row["step"] for row in train], [row.get(name) for row in train], label=name, linewidth=1.2)
    left.set(xlabel="optimizer step", ylabel="loss (nats)", title="Losses")
    for model, name in best_figures(evaluations[-1] if evaluations else {}).items():
        points = [(row["step"], row[name]) for row in evaluations if name in row]
        label = name.removeprefix("knn/").replace("/", ", ")
        if model in (RAW_PIXELS, RANDOM_INIT):
            value = points[-1][1]
            right.axhline(value, linestyle="--", linewidth=1, color="grey")
            right.annotate(label, (0, value), textcoords="offset points", xytext=(4, 3), fontsize=7, color="grey")
        else:
            right.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=label)
    right.set(xlabel="optimizer step", ylabel="top-1 (%)", title="k-NN on held-out images (last point: all neighbours)")
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
