"""What a run shows: a live panel on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

PLAIN_SECONDS = 10.0
"""Shortest time between two plain lines, except the first and the last."""

SHOWN = ("loss", "entropy", "learning_rate", "momentum")
"""Beginnings of the names of figures shown besides speed; all others are in the log only."""


def duration(seconds: float) -> str:
    """Returns ``"1:02:03"`` or ``"2:03"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Display:
    """Progress of a run; on other ranks than the main one it shows nothing."""

    def __init__(
        self, *, title: str, steps: int, first_step: int, enabled: bool, console: Console | None = None
    ) -> None:
        self._title = title
        self._steps = steps
        self._enabled = enabled
        self._console = console or Console()
        self._last_line = -PLAIN_SECONDS
        self._first_step = first_step
        self._start_seconds: float | None = None
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task(title, total=steps, completed=first_step)
        self._live: Live | None = None

    def __enter__(self) -> "Display":
        if self._enabled and self._console.is_terminal:
            self._live = Live(self._progress, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """Shows a line that stays."""
        if self._enabled:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self, renderable: RenderableType) -> None:
        """Shows a table that stays."""
        if self._enabled:
            self._console.print(renderable)

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self._live is not None:
            self._progress.update(self._task, completed=step)

    def update(self, step: int, row: Mapping[str, float]) -> None:
        """Shows a logged row; ``step`` counts optimizer steps done."""
        if not self._enabled:
            return
        remaining = self._remaining(step, row)
        if self._live is not None:
            self._progress.update(self._task, completed=step)
            self._live.update(Group(self._progress, self._table(row, remaining)))
            return
        if step < self._steps and time.monotonic() - self._last_line < PLAIN_SECONDS:
            return
        self._last_line = time.monotonic()
        self.note(f"step {step}/{self._steps}  " + "  ".join(_figures(row, remaining)))

    def _remaining(self, step: int, row: Mapping[str, float]) -> float:
        """Returns seconds to the end at the pace since the first row."""
        if self._start_seconds is None:
            self._start_seconds = row["elapsed_seconds"] - row["period_seconds"]
        pace = (row["elapsed_seconds"] - self._start_seconds) / max(1, step - self._first_step)
        return pace * (self._steps - step)

    def _table(self, row: Mapping[str, float], remaining: float) -> Table:
        table = Table.grid(padding=(0, 2))
        figures = _figures(row, remaining)
        for start in range(0, len(figures), 4):
            table.add_row(*figures[start : start + 4])
        return table


def _figures(row: Mapping[str, float], remaining: float) -> list[str]:
    figures = [f"{row['images_per_second']:,.0f} images/s", f"data wait {100 * row['data_wait']:.1f} %"]
    memory = row.get("device_bytes", row["host_bytes"])
    figures += [f"utilisation {100 * row['utilisation']:.0f} %"] if "utilisation" in row else []
    figures += [f"memory {memory / 1e9:.1f} GB"]
    figures += [f"left {duration(remaining)}"]
    figures += [f"{name} {value:.4g}" for name, value in row.items() if name.startswith(SHOWN)]
    return figures
