"""A profile of a running job, asked for by a file: ``RUN/profile.request``."""

import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from maestri.engine.config import RunConfig
from maestri.engine.continuation import Parts
from maestri.engine.distributed import mean_over_ranks, one_line
from maestri.pipelines.loader import Loader
from maestri.profiler.findings import REAL, Profile, RankSummary
from maestri.profiler.measure import TRACED_STEPS, new_collection
from maestri.profiler.memory import bytes_by_owner, host_bytes
from maestri.profiler.page import write_page
from maestri.profiler.timeline import Timeline, follow_run, seconds_by_part, timeline_of
from maestri.profiler.trace import write_trace

REQUEST = "profile.request"
FOLDER = "profile"


class LiveProfile:
    """Follows some steps of a run, on all its ranks, when a file asks for it, and leaves what was found beside it.

    It has the real step's parts alone: no other mode can be run in the middle of training.
    """

    def __init__(self, config: RunConfig, parts: Parts, loader: Loader) -> None:
        """Follows nothing yet."""
        self._config = config
        self._parts = parts
        self._loader = loader
        self._out = Path(config.out)
        self._stack = ExitStack()
        self._timeline: Timeline | None = None
        self._left = 0
        self._waited = 0.0

    def look(self) -> None:
        """Starts, with the next step, where rank 0 finds the request; every rank must call it, once a period."""
        if self._timeline is not None:
            return
        ranks = self._parts.ranks
        asked = torch.tensor([float(ranks.is_main and (self._out / REQUEST).exists())], device=ranks.device)
        if mean_over_ranks(asked).item():
            self._timeline = self._stack.enter_context(timeline_of(self._parts))
            follow_run(self._timeline, self._parts)
            self._left, self._waited = TRACED_STEPS, self._loader.wait_seconds

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Follows its block, optimizer step ``step`` (0-based), if it has been asked to."""
        if self._timeline is None:
            yield
            return
        with self._timeline.step():
            yield
        self._left -= 1
        if not self._left:
            self._leave(self._timeline, step + 1)

    def __enter__(self) -> "LiveProfile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends without a result what has not come to its end."""
        self._end()

    def _end(self) -> None:
        self._timeline = None
        self._stack.close()

    def _leave(self, timeline: Timeline, step: int) -> None:
        marks = timeline.marks()
        self._end()
        parts, ranks = self._parts, self._parts.ranks
        by_step = [seconds_by_part(of_step) for of_step in marks]
        names = dict.fromkeys(name for found in by_step for name in found)
        own = {name: statistics.median(found.get(name, 0.0) for found in by_step) for name in names}
        everyone: list[Any] = [own]
        if ranks.world_size > 1:
            everyone = [None] * ranks.world_size
            dist.all_gather_object(everyone, own, group=parts.control)
        if not ranks.is_main:
            return
        found = new_collection(self._config, ranks, recipe=f"{self._out.name} up to step {step}")
        seconds = [of_step[-1].end for of_step in marks]
        waited = (self._loader.wait_seconds - self._waited) / len(marks)
        found.modes[REAL].append((seconds, waited))
        found.steps = marks
        found.ranks = [RankSummary(rank=rank, parts=of_rank) for rank, of_rank in enumerate(everyone)]
        found.memory = bytes_by_owner(parts.engine.module, parts.method, parts.teachers, parts.masters)
        found.host_memory = host_bytes(ranks)
        dearest = max(own, key=lambda name: own[name])
        found.remark = (
            f"Of a running job: it waits for data in {waited / statistics.fmean(seconds):.1%} of the step, and the "
            f"dearest part is {dearest}; maestri profile tells causes and gains."
        )
        self._write(found.profile(complete=True), self._out / FOLDER / f"step_{step:08d}")

    def _write(self, profile: Profile, folder: Path) -> None:
        """Writes a profile's files; what goes wrong is told and ends nothing."""
        try:
            (self._out / REQUEST).unlink(missing_ok=True)  # first: a failure must not come again with each start
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(profile.as_json(), indent=1, ensure_ascii=False) + "\n"
            (folder / "profile.json").write_text(text, encoding="utf-8")
            write_page(profile, folder / "profile.html")
            write_trace(profile, folder / "trace.json")
        except OSError as error:
            print(f"train.py: the profile asked for could not be written: {one_line(error)}", file=sys.stderr)
