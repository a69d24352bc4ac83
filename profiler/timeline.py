"""When each part of a step ran: a clock on a CPU, CUDA events on a GPU, which nothing waits for until they are read."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn

from maestri.engine.continuation import Parts
from maestri.model.assignment import Assigner
from maestri.model.codebook import Codebook
from maestri.profiler.findings import UNNAMED, Mark
from maestri.profiler.parts import PartFollower, parts_of

COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "all_gather", "reduce", "reduce_scatter_tensor", "broadcast")
"""Of ``torch.distributed``."""
DEEPSPEED_COLLECTIVES = ("all_gather_function", "reduce_scatter_function")
"""Of DeepSpeed's, which keeps torch's functions from its start."""
COMMUNICATION = "communication"
COLLAPSE_DEVICE = "collapse device"
"""What makes labels of scores: Sinkhorn, centring, a codebook."""
SHORTEST = 2e-5
"""Seconds; shorter stretches are counted and not shown on a timeline."""


class Timeline(PartFollower):
    """Takes the time at each change of parts inside its block, step by step."""

    def __init__(self, parts: Mapping[str, Sequence[nn.Module]], device: torch.device) -> None:
        """Has no steps yet.

        Args:
            parts: modules by the name of their part.
            device: whose time it is.
        """
        super().__init__(parts)
        self._on_gpu = device.type == "cuda"
        self._steps: list[list[tuple[str, Any]]] = []
        self._open: list[tuple[str, Any]] = []
        self._is_open = False
        self._stream: Any = None

    def __enter__(self) -> Self:
        """Starts following; collectives are a part, too."""
        super().__enter__()
        self._stream = torch.cuda.current_stream() if self._on_gpu else None
        for name in COLLECTIVES:
            self.follow_call(dist, name, COMMUNICATION)
        from deepspeed import comm

        for name in DEEPSPEED_COLLECTIVES if comm.comm.cdb is not None else ():
            self.follow_call(comm.comm.cdb, name, COMMUNICATION)
        return self

    @contextmanager
    def step(self) -> Iterator[None]:
        """Makes its block a step."""
        self._open, self._is_open = [(UNNAMED, self._now())], True
        try:
            yield
            self.settle(UNNAMED)
            self._steps.append(self._open)
        finally:
            self._is_open = False
            self.forget()

    def _enter_part(self, part: str) -> None:
        super()._enter_part(part)
        if self._on_gpu:
            torch.cuda.nvtx.range_push(part)  # for Nsight

    def _leave_part(self) -> None:
        if self._on_gpu:
            torch.cuda.nvtx.range_pop()
        super()._leave_part()

    def settle(self, part: str) -> None:
        """Notes that ``part`` ran until now; what is between steps does not count."""
        if self._is_open:
            self._open.append((part, self._now()))

    def marks(self) -> list[list[Mark]]:
        """Returns the stretches of each step, in their order; waits for a GPU."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return [self._marks_of(changes) for changes in self._steps]

    def _marks_of(self, changes: Sequence[tuple[str, Any]]) -> list[Mark]:
        start = changes[0][1]
        times = [self._since(start, when) for _, when in changes]
        found: list[Mark] = []
        for (part, _), begin, end in zip(changes[1:], times[:-1], times[1:], strict=True):
            if found and found[-1].name == part:
                found[-1] = Mark(name=part, begin=found[-1].begin, end=end)
            elif end > begin:
                found.append(Mark(name=part, begin=begin, end=end))
        return found

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)  # of the step, whatever stream a part works on meanwhile
        return event

    def _since(self, start: Any, when: Any) -> float:
        return float(start.elapsed_time(when)) / 1000 if self._on_gpu else float(when - start)


def timeline_of(parts: Parts) -> Timeline:
    """Returns a timeline of a run's own parts; it follows once its block is entered."""
    return Timeline(parts_of(parts.method), parts.ranks.device)


def follow_run(timeline: Timeline, parts: Parts) -> None:
    """Makes parts, inside the timeline's block, of what a run calls besides its modules."""
    for device in parts.method.state.modules():
        if isinstance(device, Assigner):
            timeline.follow_call(device, "labels", COLLAPSE_DEVICE)
        elif isinstance(device, Codebook):
            timeline.follow_call(device, "assign", COLLAPSE_DEVICE)
    for role in parts.teachers:
        for average in parts.teachers.averages(role):
            timeline.follow_call(average, "move", f"average of {role}")


def seconds_by_part(marks: Sequence[Mark]) -> dict[str, float]:
    """Returns the seconds of each part of a step."""
    found: defaultdict[str, float] = defaultdict(float)
    for mark in marks:
        found[mark.name] += mark.end - mark.begin
    return dict(found)


def shown(marks: Sequence[Mark]) -> list[Mark]:
    """Returns the stretches that are long enough to be seen."""
    return [mark for mark in marks if mark.end - mark.begin >= SHORTEST]
