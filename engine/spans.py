"""Names for the parts of a step, timed without waiting for the device."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SpanRecorder:
    """Collects the durations of named spans: CUDA events on a GPU, ``perf_counter`` on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measures its block under ``name``; blocks of one name add up."""
        if not self.on_gpu:
            begin = time.perf_counter()
            try:
                yield
            finally:
                self._seconds[name] += time.perf_counter() - begin
            return
        first, last = _event(), _event()
        torch.cuda.nvtx.range_push(name)
        first.record()
        try:
            yield
        finally:
            last.record()
            torch.cuda.nvtx.range_pop()
            self._events.append((name, first, last))

    def take(self) -> dict[str, float]:
        """Returns seconds per name since the last call; a GPU is waited for: once a period, then."""
        if self._events:
            self._events[-1][2].synchronize()
        for name, first, last in self._events:
            self._seconds[name] += first.elapsed_time(last) / 1000
        taken = dict(self._seconds)
        self._events.clear()
        self._seconds.clear()
        return taken


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


_active: SpanRecorder | None = None
_place = ""


def current_recorder() -> SpanRecorder | None:
    """Returns the one that spans report to, if any."""
    return _active


def current_place() -> str:
    """Returns the name of the innermost span that the program is in, empty between spans."""
    return _place


@contextmanager
def recording(recorder: SpanRecorder) -> Iterator[SpanRecorder]:
    """Makes ``recorder`` the one that ``span`` reports to inside the block."""
    global _active
    before, _active = _active, recorder
    try:
        yield recorder
    finally:
        _active = before


@contextmanager
def span(name: str) -> Iterator[None]:
    """Marks a part of the step; costs nothing to speak of while nobody records."""
    global _place
    before, _place = _place, name
    try:
        if _active is None:
            yield
        else:
            with _active.measure(name):
                yield
    finally:
        _place = before
