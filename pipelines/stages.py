"""What the data path is doing now, and how long each part of it has taken so far."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stages:
    """A board on which the data path's threads note what they are at.

    A watchdog reads from it which stage is stuck, a benchmark where the time went.
    """

    def __init__(self) -> None:
        """Notes nothing yet."""
        self.clock: Callable[[], float] = time.perf_counter
        """What seconds are read from; ``time.thread_time`` counts a thread's own work, without what it waits for."""
        self._active: dict[tuple[int, str], tuple[str, float]] = {}
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def at(self, name: str, detail: str = "", *, counts: bool = True) -> Iterator[None]:
        """Notes that this thread is at a stage.

        Args:
            name: of the stage.
            detail: a shard, a position; shown when it is stuck there.
            counts: whether its time counts; not where its parts are added by themselves.
        """
        clock = self.clock  # one for the whole block
        began, counted_from = time.monotonic(), clock()
        key = threading.get_ident(), name
        self._active[key] = (detail, began)
        try:
            yield
        finally:
            self._active.pop(key, None)
            if counts:
                self.add(name, clock() - counted_from)

    def add(self, name: str, seconds: float) -> None:
        """Adds to what a stage has taken."""
        with self._lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Returns how long each stage has taken so far, summed over threads, in the order they were first noted."""
        with self._lock:
            return dict(self._seconds)

    def stuck(self) -> str:
        """Returns the stages that threads are at now, longest first, with details and seconds, for people."""
        now = time.monotonic()
        active = sorted(self._active.copy().items(), key=lambda item: item[1][1])
        shown = [
            f"{name}{f' {detail}' if detail else ''} for {now - began:.0f} s" for (_, name), (detail, began) in active
        ]
        return "; ".join(shown) or "no stage"
