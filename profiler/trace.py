"""A step as a trace for Perfetto (ui.perfetto.dev) and chrome://tracing."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from maestri.profiler import figures
from maestri.profiler.findings import Mark, Profile

PROCESS = 0
"""Number of the process: rank 0."""


def write_trace(profile: Profile, path: Path) -> None:
    """Writes rank 0's median step.

    Raises:
        OSError: it could not be written.
    """
    path.write_text(json.dumps(as_trace(profile)) + "\n", encoding="utf-8")


def as_trace(profile: Profile) -> dict[str, Any]:
    """Returns the trace: an event around the step, and one for each mark, in microseconds."""
    return {
        "displayTimeUnit": "ms",
        "otherData": {"title": profile.title, "verdict": profile.verdict, **profile.hardware, **profile.settings},
        "traceEvents": list(_events(profile)),
    }


def _events(profile: Profile) -> Iterator[dict[str, Any]]:
    lanes = _lanes(profile.timeline)
    yield _named("process_name", 0, "rank 0")
    for lane in range(max(1, len(lanes))):
        yield _named("thread_name", lane, "step" if lane == 0 else f"step, beside it {lane}")
    last = max((_nanoseconds(mark.end) for mark in profile.timeline), default=0)
    if last:
        yield _complete("step", "step", 0, 0, last, {"images": profile.images})
    found = {row.name: row for row in figures.part_figures(profile)}
    for lane, marks in enumerate(lanes):
        for mark in marks:
            row = found.get(mark.name)
            about: dict[str, Any] = {}
            if row is not None:
                about = {"median ms": 1e3 * row.median, "p95 ms": 1e3 * row.p95, "share of the step": row.share}
                about |= {"GFLOP": row.flops / 1e9, "share of the peak": row.utilisation} if row.flops else {}
            begin, end = _nanoseconds(mark.begin), _nanoseconds(mark.end)
            yield _complete(mark.name, figures.kind_of(mark.name), lane, begin, end, about)


def _lanes(marks: Sequence[Mark]) -> list[list[Mark]]:
    """Returns marks by lane, by their begin; in a lane they nest, as viewers need it."""
    lanes: list[list[Mark]] = []
    open_ends: list[list[int]] = []
    for mark in sorted(marks, key=lambda mark: (_nanoseconds(mark.begin), -_nanoseconds(mark.end))):
        begin, end = _nanoseconds(mark.begin), _nanoseconds(mark.end)
        for ends in open_ends:
            while ends and ends[-1] <= begin:
                ends.pop()
        lane = next((lane for lane, ends in enumerate(open_ends) if not ends or end <= ends[-1]), len(lanes))
        if lane == len(lanes):
            lanes.append([])
            open_ends.append([])
        lanes[lane].append(mark)
        open_ends[lane].append(end)
    return lanes


def _nanoseconds(seconds: float) -> int:
    return round(1e9 * seconds)


def _named(what: str, lane: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": PROCESS, "tid": lane, "args": {"name": name}}


def _complete(name: str, kind: str, lane: int, begin: int, end: int, about: dict[str, Any]) -> dict[str, Any]:
    """Returns an event; times are nanoseconds, which keeps what nests nested."""
    times = {"ts": begin / 1e3, "dur": max(0, end - begin) / 1e3}
    return {"ph": "X", "name": name, "cat": kind, "pid": PROCESS, "tid": lane, **times, "args": about}
