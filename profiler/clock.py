"""Times of repeated work: CUDA events on a GPU, which nothing waits for until they are read; a clock on a CPU."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from maestri.engine.spans import SpanRecorder

Clock = Callable[[], float]
"""Seconds: ``time.perf_counter``, or ``time.process_time``, which other programs on the machine do not lengthen."""


class Laps(SpanRecorder):
    """Collects the durations of named blocks and spans, each for itself."""

    def __init__(self, device: torch.device, *, clock: Clock = time.perf_counter) -> None:
        """Starts with none; ``clock`` is read on a CPU."""
        super().__init__(device)
        self._clock = clock
        self._laps: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measures its block under ``name``."""
        if self.on_gpu:
            with super().measure(name):
                yield
            return
        begin = self._clock()
        try:
            yield
        finally:
            self._laps[name].append(self._clock() - begin)

    def take_laps(self) -> dict[str, list[float]]:
        """Returns seconds of each block since the last call, in their order, by name; waits for a GPU."""
        if self._events:
            self._events[-1][2].synchronize()
        for name, first, last in self._events:
            self._laps[name].append(first.elapsed_time(last) / 1000)
        self._events.clear()
        taken = dict(self._laps)
        self._laps.clear()
        return taken


def seconds_of(
    work: Callable[[], object],
    *,
    device: torch.device,
    repeats: int,
    warm_up: int = 2,
    clock: Clock = time.perf_counter,
) -> list[float]:
    """Returns seconds of each of ``repeats`` runs of ``work``, after ``warm_up`` that do not count."""
    laps = Laps(device, clock=clock)
    for _ in range(warm_up):
        work()
    for _ in range(repeats):
        with laps.measure("work"):
            work()
    return laps.take_laps()["work"]
