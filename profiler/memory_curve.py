"""What tensors take at each moment of a step, and in which part it is then, as torch's allocators tell."""

import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from maestri.profiler.findings import UNNAMED, Moment
from maestri.profiler.parts import PartFollower

MOST_MOMENTS = 400
"""Of a curve; of those between, each stretch keeps the one with the most bytes."""


class _Changes(PartFollower):
    """Notes when each part has ended, on the clock of torch's profiler."""

    def __init__(self, parts: Mapping[str, Sequence[nn.Module]]) -> None:
        super().__init__(parts)
        self.ends: list[int] = []
        self.names: list[str] = []

    def settle(self, part: str) -> None:
        self.ends.append(time.time_ns())
        self.names.append(part)

    def part_at(self, when: int) -> str:
        """Returns the part that ran at a time in nanoseconds."""
        number = bisect_right(self.ends, when)
        return self.names[number] if number < len(self.names) else UNNAMED


def memory_curve(
    parts: Mapping[str, Sequence[nn.Module]], device: torch.device, held: int, step: Callable[[], None]
) -> list[Moment]:
    """Returns the memory over one step; of a GPU at the times the host asked for it.

    Args:
        parts: modules by the name of their part.
        device: whose memory it is.
        held: bytes at the step's begin.
        step: makes the step.
    """
    began = time.time_ns()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        with _Changes(parts) as changes:
            step()
    found = [Moment(seconds=0.0, bytes=held, part=changes.part_at(began))]
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type().name.lower() == device.type:
            held += event.nbytes()
            when = event.start_ns()
            found.append(Moment(seconds=max(0, when - began) / 1e9, bytes=held, part=changes.part_at(when)))
    return found


def thinned(moments: Sequence[Moment], *, most: int = MOST_MOMENTS) -> list[Moment]:
    """Returns at most so many moments: of each of equally long stretches the one with the most bytes."""
    if len(moments) <= most:
        return list(moments)
    begin, end = moments[0].seconds, moments[-1].seconds
    chosen: dict[int, Moment] = {}
    for moment in moments:
        stretch = min(most - 1, int((moment.seconds - begin) / (end - begin) * most)) if end > begin else 0
        if stretch not in chosen or moment.bytes > chosen[stretch].bytes:
            chosen[stretch] = moment
    return [chosen[stretch] for stretch in sorted(chosen)]


def peak_by_part(moments: Sequence[Moment]) -> dict[str, int]:
    """Returns the most bytes in each part, by the part's first moment."""
    found: dict[str, int] = {}
    for moment in moments:
        found[moment.part] = max(found.get(moment.part, 0), moment.bytes)
    return found
