"""Pictures of a study: accuracy of each entry, against labelled images and against minutes; and what steps cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maestri.study.config import Budget
from maestri.study.results import BASELINE_NAMES, Cell, SetResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^v<>PXph*"


def shot_counts(cells: Sequence[Cell]) -> list[int]:
    """Returns the numbers of labelled images a class that were judged."""
    found = {name for cell in cells for run in cell.results.values() for name in run.found}
    return sorted(int(name.removesuffix("-shot")) for name in found if name.endswith("-shot"))


def _shot_kinds(cells: Sequence[Cell]) -> list[str]:
    return [f"{count}-shot" for count in shot_counts(cells)]


def draw(found: SetResult, folder: Path) -> list[Path]:
    """Returns the PNGs drawn of a set: ``<set>_entries.png``, ``…_shots.png``, ``…_minutes.png``, ``…_cost.png``."""
    names = list(dict.fromkeys(cell.entry.name for cells in found.cells.values() for cell in cells))
    styles = {name: _style(number, of=len(names)) for number, name in enumerate(names)}
    with_runs = {
        budget: kept for budget, cells in found.cells.items() if (kept := [cell for cell in cells if cell.results])
    }
    drawn = []
    if with_runs:
        drawn.append(_entries(found, with_runs, folder / f"{found.name}_entries.png"))
        drawn.append(_panels(found, with_runs, styles, _shots, folder / f"{found.name}_shots.png"))
        drawn.append(_panels(found, with_runs, styles, _minutes, folder / f"{found.name}_minutes.png"))
    if found.costs:
        drawn.append(_costs(found, folder / f"{found.name}_cost.png"))
    return drawn


def _style(number: int, *, of: int) -> dict[str, Any]:
    """Returns how an entry's line is drawn; up to 60 differ."""
    from matplotlib import colormaps

    colours = colormaps["tab10" if of <= 10 else "tab20"]
    return {"color": colours(number % colours.N), "marker": MARKERS[number % len(MARKERS)], "markersize": 5}


def _entries(found: SetResult, cells: Mapping[Budget, Sequence[Cell]], path: Path) -> Path:
    """Draws panels, a row for each budget, a column for each protocol; in them a line for each entry, a dot a run."""
    kinds = {budget: [*_shot_kinds(of_budget), "knn"] for budget, of_budget in cells.items()}
    columns = max(map(len, kinds.values()))
    heights = [0.8 + 0.24 * len(of_budget) for of_budget in cells.values()]
    figure = _figure(width=2.4 + 2.5 * columns, height=0.4 + sum(heights))
    grid = figure.subplots(len(cells), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, (budget, of_budget) in zip(grid, cells.items(), strict=True):
        for axes, kind in zip(row, kinds[budget], strict=False):
            for place, cell in enumerate(of_budget):
                values = [run.found[kind]["top1"] for run in cell.results.values() if kind in run.found]
                axes.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.5, markersize=4)
                axes.plot(np.mean(values) if values else np.nan, place, "|", color="black", markersize=11)
            first = of_budget[0].spread(kind)
            if first:  # what all others are compared with
                axes.axvline(first.mean, color="grey", linewidth=0.8)
            axes.set_yticks(range(len(of_budget)), [cell.entry.name for cell in of_budget])
            axes.tick_params(labelsize=8, labelleft=axes is row[0])
            axes.set_title(f"equal {budget}: {'k-NN' if kind == 'knn' else kind}", fontsize=9)
            axes.grid(axis="x", alpha=0.3)
            axes.invert_yaxis()
        for axes in row[len(kinds[budget]) :]:
            axes.remove()
    figure.supxlabel(f"top-1 on {found.split or 'held-out'} images (%); a dot a run, a bar their mean", fontsize=9)
    figure.suptitle(found.name)
    figure.savefig(path, dpi=120)
    return path


def _panels(
    found: SetResult,
    cells: Mapping[Budget, Sequence[Cell]],
    styles: Mapping[str, dict[str, Any]],
    panel: Any,
    path: Path,
) -> Path:
    figure = _figure(width=5.2 * len(cells) + 2.2, height=4.6)
    panels = figure.subplots(1, len(cells), squeeze=False, sharey=True)[0]
    for axes, (budget, of_budget) in zip(panels, cells.items(), strict=True):
        panel(axes, found, of_budget, styles)
        axes.set_title(f"{found.name}, equal {budget}")
        axes.grid(alpha=0.3)
        axes.label_outer()
    lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    labels = [name for name in (*styles, *BASELINE_NAMES.values()) if name in lines]
    figure.legend([lines[name] for name in labels], labels, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)
    return path


def _shots(axes: "Axes", found: SetResult, cells: Sequence[Cell], styles: Mapping[str, dict[str, Any]]) -> None:
    counts = shot_counts(cells)
    kinds = [*_shot_kinds(cells), "knn"]
    places = np.arange(len(kinds))
    for number, cell in enumerate(cells):
        spreads = [cell.spread(kind) for kind in kinds]
        shift = 0.25 * (number / max(1, len(cells) - 1) - 0.5)  # so that bars of deviation do not hide each other
        axes.errorbar(
            places + shift,
            [spread.mean if spread else np.nan for spread in spreads],
            yerr=[(spread.deviation or 0.0) if spread else 0.0 for spread in spreads],
            label=cell.entry.name,
            linewidth=1.2,
            capsize=2,
            **styles[cell.entry.name],
        )
    for name, of_model in found.baselines.items():
        values = [of_model[kind]["top1"] if kind in of_model else np.nan for kind in kinds]
        dashes = ":" if name == "raw_pixels" else "--"
        axes.plot(places, values, color="grey", linestyle=dashes, linewidth=1.2, label=BASELINE_NAMES[name])
    axes.set_xticks(places, [*map(str, counts), "all (k-NN)"])
    axes.set(xlabel="labelled images of each class", ylabel=f"top-1 on {found.split or 'held-out'} images (%)")


def _minutes(axes: "Axes", found: SetResult, cells: Sequence[Cell], styles: Mapping[str, dict[str, Any]]) -> None:
    for cell in cells:
        runs = [run.curve for run in cell.results.values() if run.curve]
        if not runs:
            continue  # nothing is finished, or steps were not timed
        # Seeds may have been evaluated at different steps, where the study was changed in between.
        shared = set.intersection(*({minute for minute, _ in curve} for curve in runs))
        curves = np.array([[point for point in curve if point[0] in shared] for curve in runs])
        minutes, accuracies = curves[0, :, 0], curves[:, :, 1]
        style, means = styles[cell.entry.name], accuracies.mean(axis=0)
        axes.plot(minutes, means, label=cell.entry.name, linewidth=1.2, **style)
        if len(curves) > 1:
            deviations = accuracies.std(axis=0, ddof=1)
            low, high = means - deviations, means + deviations
            axes.fill_between(minutes, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel="minutes of training steps", ylabel="k-NN top-1 on held-out images (%)")


def _costs(found: SetResult, path: Path) -> Path:
    stages = list(found.costs.items())
    several = {name for (name, _), _ in stages if sum(other == name for (other, _), _ in stages) > 1}
    labels = [f"{name}: {stage}" if name in several else name for (name, stage), _ in stages]
    panels = {
        "ms a step": [1e3 * cost.step_seconds for _, cost in stages],
        "images/s": [cost.images_per_second for _, cost in stages],
        "memory above the libraries', MB": [cost.peak_bytes / 1e6 for _, cost in stages],
    }
    figure = _figure(width=12, height=1.4 + 0.28 * len(stages))
    for number, (axes, (title, values)) in enumerate(zip(figure.subplots(1, 3), panels.items(), strict=True)):
        bars = axes.barh(labels, values, color="tab:blue")
        axes.bar_label(bars, labels=[f"{value:,.0f}" for value in values], padding=3, fontsize=8)
        axes.set(title=title, xlim=(0, 1.2 * max(values) or 1.0))
        axes.tick_params(labelsize=8, labelleft=not number)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{found.name}: what steps cost")
    figure.savefig(path, dpi=120)
    return path


def _figure(*, width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
