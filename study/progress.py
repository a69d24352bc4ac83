"""What a study shows while it runs: a bar with what is under way on a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from maestri.engine.display import duration


class StudyProgress:
    """Works done of all, what runs now, and the time that is left, first as expected and then by the pace so far."""

    def __init__(self, title: str, *, works: int, seconds: float, jobs: int, console: Console) -> None:
        """Shows nothing yet.

        Args:
            title: of what is done.
            works: to be done.
            seconds: of training expected, summed over them.
            jobs: done at once.
            console: where.
        """
        self._console = console
        self._works, self._seconds, self._jobs = works, seconds, jobs
        self._done, self._done_seconds = 0, 0.0
        self._began = time.monotonic()
        self._bar = Progress(TextColumn("[bold]{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
        self._task = self._bar.add_task(title, total=works)
        self._live: Live | None = None

    def __enter__(self) -> "StudyProgress":
        if self._console.is_terminal:
            self._live = Live(self._bar, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def ended(self, label: str, *, seconds: float = 0.0, failure: str = "") -> None:
        """Counts a work, and leaves a line of it."""
        self._done += 1
        self._done_seconds += seconds
        self._bar.advance(self._task)
        result = f"failed: {failure}" if failure else "done"
        self._say(f"[{self._done}/{self._works}] {label}: {result}, {duration(self.seconds_left())} left")

    def show(self, under_way: Sequence[str]) -> None:
        """Shows what runs now."""
        if self._live is not None:
            lines = [Text(f"  {line}") for line in under_way]
            left = Text(f"  {duration(self.seconds_left())} left", style="dim")
            self._live.update(Group(self._bar, *lines, left))

    def seconds_left(self) -> float:
        """Returns the time left.

        The pace expected counts as much as one average work for each job: the first works to end are short ones, and
        what runs beside them is not counted yet.
        """
        passed = time.monotonic() - self._began
        if not self._seconds:  # baselines alone, of which nothing is expected
            return passed / self._done * (self._works - self._done) if self._done else 0.0
        first = self._seconds / self._works * self._jobs
        pace = (passed + first / self._jobs) / (self._done_seconds + first)
        return pace * (self._seconds - self._done_seconds)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
