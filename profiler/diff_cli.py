"""``maestri profile diff``: what changed between two profiles, and whether it is more than noise."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from maestri.profiler import figures
from maestri.profiler.compare import Change, Comparison, compare
from maestri.profiler.figures import NOTHING
from maestri.profiler.findings import Profile, from_json

FILE_NAME = "profile.json"
"""Of the profile in a folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffArguments:
    """Compare two profiles: what changed, and whether it is more than noise.

    A figure has a mark where its rounds in A and in B differ by more than chance would have it, and by more than the
    profiles' noise.
    """

    before: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """A profile's folder, or its profile.json."""
    after: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """The like, made later."""


def run(argv: Sequence[str]) -> None:
    """Prints what changed.

    Raises:
        ValueError: an argument is wrong, or a file cannot be read as a profile.
    """
    arguments = tyro.cli(DiffArguments, prog="maestri profile diff", args=argv, use_underscores=False)
    found = compare(read_profile(arguments.before), read_profile(arguments.after))
    console = Console()
    for warning in found.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))
    console.print(comparison_table(found))
    console.print(Text(found.sentence, style="bold"))


def read_profile(path: Path) -> Profile:
    """Returns the profile of a folder or file.

    Raises:
        ValueError: there is none, or it is of another form.
    """
    file = path / FILE_NAME if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror or error}") from None
    except ValueError:  # neither UTF-8 nor JSON
        raise ValueError(f"{file}: not JSON; expected the {FILE_NAME} of a profile") from None
    try:
        profile = from_json(values)
        if not profile.modes or not all(times.seconds for times in profile.modes.values()):
            raise ValueError("no step was measured in it")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return profile


def comparison_table(found: Comparison) -> Table:
    """Returns every figure of both, its change, and a mark where that is more than noise."""
    table = Table(
        title="A → B",
        caption="● more than noise",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for number, heading in enumerate(("", "A", "B", "B − A", "change", "")):
        table.add_column(heading, justify="right" if number in (1, 2, 3, 4) else "left", no_wrap=number > 0)
    _add_time(table, f"step, {found.mode}, ms", found.step)
    one, other = found.images_per_second
    more = figures.percent_more(one, other)
    table.add_row("images/s", figures.rate(one), figures.rate(other), f"{other - one:+,.1f}", more, _mark(found.step))
    for change in found.modes:
        _add_time(table, f"step, {change.name}, ms", change)
    if found.stall is not None:
        shares = figures.share(found.stall.before), figures.share(found.stall.after)
        points = f"{100 * found.stall.difference:+.1f} points"
        table.add_row("not the model’s", *shares, points, "", _mark(found.stall), end_section=True)
    if found.parts:
        table.add_row(Text("parts, ms", style="bold"))
    for change in found.parts:
        _add_time(table, f"  {figures.label_of(change.name)}", change)
    if found.memory:
        table.add_row(Text("memory of rank 0", style="bold"))
    for change in found.memory:
        sizes = figures.size(change.before), figures.size(change.after)
        difference = figures.size(abs(change.difference))
        sign = "-" if change.difference < 0 else "+"
        table.add_row(
            f"  {figures.label_of(change.name)}",
            *sizes,
            f"{sign}{difference}" if change.difference else NOTHING,
            figures.percent_more(change.before, change.after) if change.difference else NOTHING,
            _mark(change),
        )
    return table


def _add_time(table: Table, label: str, change: Change) -> None:
    largest = max(change.before, change.after)
    sign = "-" if change.difference < 0 else "+"
    table.add_row(
        label,
        figures.milliseconds(change.before, beside=largest),
        figures.milliseconds(change.after, beside=largest),
        sign + figures.milliseconds(abs(change.difference), beside=largest),
        figures.percent_more(change.before, change.after),
        _mark(change),
    )


def _mark(change: Change) -> Text:
    if not change.called:
        return Text("")
    return Text("●", style="red" if change.difference > 0 else "green")
