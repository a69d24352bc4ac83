"""What was measured, as one table: for a terminal, and as Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from maestri.evals.protocol import MEASURES, Accuracies, AccuracyReport, ClusterReport, LowshotReport, Setting

MARK = "▸"
SPLITS = {"holdout": "held-out", "test": "test"}

Row = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """A table of figures, models one below the other."""

    title: str
    """What was measured, and its unit."""
    columns: tuple[str, ...]
    """Headings; of a row's cells."""
    rows: Mapping[str, Sequence[Row]]
    """By model."""
    num_words: int
    """Columns on the left that hold words, not figures."""
    note: str = ""
    """What marks mean."""

    def as_table(self) -> Table:
        """Returns it for a terminal of 80 columns: a model's name stands above its rows, or in the only one."""
        table = Table(
            title=self.title, caption=self.note, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
        )
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="left" if number < self.num_words else "right", no_wrap=True)
        for number, (model, rows) in enumerate(self.rows.items()):
            if len(rows) == 1 and not rows[0][0]:
                table.add_row(model, *rows[0][1:])
                continue
            if number:
                table.add_row()
            table.add_row(f"[bold]{model}[/bold]")
            for row in rows:
                table.add_row(*row)
        return table

    def as_markdown(self) -> str:
        """Returns it with the model in the first column."""
        lines = [f"## {self.title}", "", "| model | " + " | ".join(self.columns) + " |"]
        lines.append("|---|" + "---|" * self.num_words + "---:|" * (len(self.columns) - self.num_words))
        lines += [f"| {model} | " + " | ".join(row) + " |" for model, rows in self.rows.items() for row in rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])]) + "\n"


def accuracy_sheet(report: AccuracyReport, title: str) -> Sheet:
    """Returns every accuracy: a row for each pooling and split, a column for each setting."""
    rows = {model: list(_accuracy_rows(report, model)) for model in report.test or report.holdout}
    columns = (report.setting, *(f"{setting:g}" for setting in _settings(report)))
    return Sheet(title=title, columns=columns, rows=rows, num_words=1, note=chosen_note(report))


def lowshot_sheet(report: LowshotReport, title: str) -> Sheet:
    """Returns every accuracy, mean ± deviation: a row for each kind, pooling and split, a column for each strength."""
    first = next(iter(report.values()))
    rows: dict[str, list[Row]] = {model: [] for model in first.test or first.holdout}
    for model, of_model in rows.items():
        for kind, of_kind in report.items():
            deviations = {"holdout": of_kind.holdout_deviation, "test": of_kind.test_deviation}
            of_model += [(row[0], kind, *row[1:]) for row in _accuracy_rows(of_kind, model, deviations)]
    columns = (first.setting, "", *(f"{setting:g}" for setting in _settings(first)))
    return Sheet(title=title, columns=columns, rows=rows, num_words=2, note=chosen_note(first))


def cluster_sheet(report: ClusterReport, title: str) -> Sheet:
    """Returns every measure: means over runs ± their deviation, and the run of lowest inertia."""
    rows: dict[str, list[Row]] = {}
    for model in report.test or report.holdout:
        chosen, _ = report.choice(model)
        for split, spreads in (("holdout", report.holdout_measures), ("test", report.test_measures)):
            for pooling, measures in spreads.get(model, {}).items():
                name = f"{MARK if pooling == chosen else ''}{pooling}, {SPLITS[split]}"
                means = [f"{measures[name].mean:.1f}±{measures[name].deviation:.1f}" for name in MEASURES]
                lowest = [f"{measures[name].lowest_inertia:.1f}" for name in MEASURES]
                rows.setdefault(model, []).extend([(name, "mean", *means), ("", "lowest inertia", *lowest)])
    return Sheet(title=title, columns=("", "runs", *MEASURES), rows=rows, num_words=2, note=chosen_note(report))


def chosen_note(report: AccuracyReport) -> str:
    """Returns a sentence that says what the mark means."""
    what = "pooling" if report.setting == "clusters" else f"pooling and {report.setting}"
    return f"{MARK} {what} chosen on {'held-out training images' if report.holdout else 'the test images themselves'}"


def _settings(report: AccuracyReport) -> list[Setting]:
    table = next(iter((report.test or report.holdout).values()))
    return list(next(iter(table.values())))


def _accuracy_rows(
    report: AccuracyReport, model: str, deviations: Mapping[str, Accuracies] | None = None
) -> Iterator[Row]:
    choice = report.choice(model)
    for pooling in (report.test or report.holdout)[model]:
        for split, accuracies in (("holdout", report.holdout), ("test", report.test)):
            if model not in accuracies:
                continue
            cells = []
            for setting, value in accuracies[model][pooling].items():
                mark = MARK if choice == (pooling, setting) else ""
                if deviations is None:
                    cells.append(f"{mark}{value:.2f}")
                else:
                    cells.append(f"{mark}{value:.1f}±{deviations[split][model][pooling][setting]:.1f}")
            yield (f"{pooling}, {SPLITS[split]}", *cells)
