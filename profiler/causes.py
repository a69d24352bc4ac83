"""From measured modes and stages to the cause of a stall, and to what removing it should give.

A real step takes R, with the stored bytes in the page cache P, on a resident batch G, and on a resident batch beside a
working loader C.  Of what data costs, R − G, contention is C − G, fetching is R − P, and the rest is preparation:
reading, decoding and making views, of which the slowest stage sets the pace.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from maestri.profiler.findings import CACHED, CROWDED, REAL, RESIDENT, UNNAMED, Gain, ModeTimes, Stage
from maestri.profiler.timeline import COMMUNICATION

GROUPS: Mapping[str, tuple[str, ...]] = {
    "store": ("read",),
    "decode": ("decode", "DALI"),
    "augment": ("resize", "colour", "corrupt"),
    "plan": ("order", "plan"),
}
"""Stages of the data path by what they are for; those of ``decode`` and ``augment`` share the executor's threads."""
POOL = ("decode", "augment")
LOUDEST = 0.15
"""Relative noise above which there is no verdict."""
SMALLEST_STALL = 0.03
"""Share of the step that data may cost before it counts as the limit; noise may raise it."""
TALKATIVE = 0.3
"""Share of the step in collectives from which on communication is the limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What was measured, and the settings that turn it."""

    modes: Mapping[str, ModeTimes]
    """At least ``REAL`` and ``RESIDENT``."""
    images: int
    """Per optimizer step and rank."""
    world_size: int
    """Ranks."""
    stages: Sequence[Stage]
    """Of the data path, measured with nothing beside it."""
    loader_rate: float
    """Images per second and rank of the loader with nothing beside it."""
    parts: Mapping[str, float]
    """Median seconds by part of the step."""
    cores: int
    """Of this machine that a rank may use."""
    num_threads: int
    """Of the executor."""
    read_threads: int
    """That read from shards."""
    on_gpu: bool
    """Whether the model runs on a GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What follows."""

    stall: float
    """1 − G / R, not below 0."""
    cause: str
    """``store``, ``decode``, ``augment``, ``plan``, ``contention``, ``compute`` or ``communication``."""
    gains: list[Gain]
    """What to expect, the most first."""
    noise: float
    """Deviation of rounds' means as a share of their median, by the median of their distances from it, which one round
    that was disturbed does not move; the larger of ``REAL``'s and ``RESIDENT``'s."""
    verdict: str
    """One sentence."""


def judge(evidence: Evidence) -> Judgement:
    """Returns the cause of the stall and the gains to expect."""
    real, resident = (evidence.modes[name].step for name in (REAL, RESIDENT))
    noise = max(_noise(evidence.modes[name]) for name in (REAL, RESIDENT))
    stall = max(0.0, 1.0 - resident / real)
    costs = _costs(evidence)
    limited_by_data = stall > max(SMALLEST_STALL, noise)
    cause = max(costs, key=lambda name: costs[name]) if limited_by_data else _model_cause(evidence)
    gains = sorted(_gains(evidence, costs), key=lambda gain: -gain.images_per_second)
    return Judgement(
        stall=stall, cause=cause, gains=gains, noise=noise, verdict=_verdict(evidence, stall, noise, cause, costs)
    )


def group_seconds(stages: Sequence[Stage], *, busy: bool = False) -> dict[str, float]:
    """Returns the seconds an image takes in each group of stages; of a core, if ``busy``."""
    found = {group: 0.0 for group in GROUPS}
    for stage in stages:
        for group, names in GROUPS.items():
            if stage.name in names:
                found[group] += stage.busy if busy else stage.seconds_per_image
    return found


def predicted_step(
    evidence: Evidence,
    *,
    without: str = "",
    threads: int | None = None,
    readers: int | None = None,
    scale: Mapping[str, float] | None = None,
) -> float:
    """Returns the step's seconds after a change of the data path.

    The step is the longer of the model's, as the loader's work beside it slows it down, and the slowest stage's; both
    are scaled to what was measured as it is.

    Args:
        evidence: as it is.
        without: a group of stages that is gone.
        threads: of the executor.
        readers: threads that read.
        scale: multiples of groups' seconds, of waiting and work alike.
    """
    factors = {group: 0.0 if group == without else (scale or {}).get(group, 1.0) for group in GROUPS}
    as_it_is = _model(evidence, dict.fromkeys(GROUPS, 1.0), evidence.num_threads, evidence.read_threads)
    changed = _model(evidence, factors, threads or evidence.num_threads, readers or evidence.read_threads)
    return evidence.modes[REAL].step * changed / as_it_is


def clamped(evidence: Evidence, step: float) -> float:
    """Returns a predicted step, not longer than it is now, and not shorter than with data for free."""
    real, resident = (evidence.modes[name].step for name in (REAL, RESIDENT))
    return max(min(resident, real), min(real, step))


def _model(evidence: Evidence, factors: Mapping[str, float], threads: int, readers: int) -> float:
    resident = evidence.modes[RESIDENT].step
    crowded = evidence.modes[CROWDED].step if CROWDED in evidence.modes else resident
    busy = group_seconds(evidence.stages, busy=True)
    whole = sum(busy.values())
    # What a stage waits for takes nothing from the model.
    share = sum(busy[group] * factors[group] for group in GROUPS) / whole if whole else 0.0
    beside = resident + max(0.0, crowded - resident) * share
    # The loader may be slower than its slowest stage: threads wait for each other, or do what no stage counts.  More of
    # them do not shorten that.
    explained = _pace(evidence, dict.fromkeys(GROUPS, 1.0), evidence.num_threads, evidence.read_threads)
    rest = max(0.0, 1.0 / evidence.loader_rate - explained)
    return max(beside, evidence.images * (rest + _pace(evidence, factors, threads, readers)))


def _pace(evidence: Evidence, factors: Mapping[str, float], threads: int, readers: int) -> float:
    return max(_paces(evidence, factors, threads, readers).values())


def _paces(evidence: Evidence, factors: Mapping[str, float], threads: int, readers: int) -> dict[str, float]:
    """Returns seconds an image by what works side by side: the executor's threads, readers, the planning thread."""
    seconds, busy = (group_seconds(evidence.stages, busy=busy) for busy in (False, True))
    in_pool = [sum(taken[group] * factors[group] for group in POOL) for taken in (seconds, busy)]
    return {
        "pool": max(in_pool[0] / threads, in_pool[1] / min(threads, evidence.cores)),
        "store": seconds["store"] * factors["store"] / readers,
        "plan": seconds["plan"] * factors["plan"],
    }


def _noise(times: ModeTimes) -> float:
    middle = times.step
    return 1.4826 * statistics.median(abs(mean - middle) for mean in times.means) / middle


def _costs(evidence: Evidence) -> dict[str, float]:
    """Returns seconds of the step by cause, of those that belong to data."""
    modes = evidence.modes
    real, resident = modes[REAL].step, modes[RESIDENT].step
    total = max(0.0, real - resident)
    contention = min(total, max(0.0, modes[CROWDED].step - resident)) if CROWDED in modes else 0.0
    fetching = min(total - contention, max(0.0, real - modes[CACHED].step)) if CACHED in modes else 0.0
    costs = {"contention": contention, "store": fetching}
    rest = total - contention - fetching
    costs[_slowest_group(evidence)] = costs.get(_slowest_group(evidence), 0.0) + rest
    return costs


def _slowest_group(evidence: Evidence) -> str:
    """Returns the group of stages that sets the data path's pace."""
    seconds = group_seconds(evidence.stages)
    pace = _paces(evidence, dict.fromkeys(GROUPS, 1.0), evidence.num_threads, evidence.read_threads)
    slowest = max(pace, key=lambda name: pace[name])
    return max(POOL, key=lambda group: seconds[group]) if slowest == "pool" else slowest


def _model_cause(evidence: Evidence) -> str:
    whole = sum(evidence.parts.values())
    talks = evidence.parts.get(COMMUNICATION, 0.0)
    return "communication" if evidence.world_size > 1 and whole and talks / whole > TALKATIVE else "compute"


def _gains(evidence: Evidence, costs: Mapping[str, float]) -> list[Gain]:
    real, resident = evidence.modes[REAL].step, evidence.modes[RESIDENT].step
    images = evidence.images * evidence.world_size
    found = [Gain(cause="data", images_per_second=images / resident, knob="everything below about data")]
    if costs.get("contention"):
        after = max(resident, real - costs["contention"])
        found.append(Gain(cause="contention", images_per_second=images / after, knob=_knob("contention", evidence)))
    if CACHED in evidence.modes or costs.get("store"):
        without = min(real - costs.get("store", 0.0), predicted_step(evidence, without="store"))
        after = clamped(evidence, without)
        found.append(Gain(cause="store", images_per_second=images / after, knob=_knob("store", evidence)))
    seconds = group_seconds(evidence.stages)
    for group in POOL:
        if seconds[group]:
            after = clamped(evidence, predicted_step(evidence, without=group))
            found.append(Gain(cause=group, images_per_second=images / after, knob=_knob(group, evidence)))
    talks = evidence.parts.get(COMMUNICATION, 0.0)
    if evidence.world_size > 1 and talks:
        after = max(real - talks, 0.0) or real
        knob = _knob("communication", evidence)
        found.append(Gain(cause="communication", images_per_second=images / after, knob=knob))
    return found


def _knob(cause: str, evidence: Evidence) -> str:
    threads = f"data.num_threads ({evidence.num_threads} of {evidence.cores} cores)"
    return {
        "store": f"data.read_threads ({evidence.read_threads}), data.prefetch, data.order windowed, a faster disk",
        "decode": f"{threads}" + (", data.hardware_decoder" if evidence.on_gpu else "") + ", smaller stored images",
        "augment": f"{threads}, fewer or smaller views, less colour and blur",
        "contention": f"cores of their own: engine.threads + data.num_threads at most {evidence.cores} a rank",
        "communication": "batch.accumulation, a larger batch per rank, a lower engine.zero_stage",
    }[cause]


def _verdict(evidence: Evidence, stall: float, noise: float, cause: str, costs: Mapping[str, float]) -> str:
    images = evidence.images * evidence.world_size
    real = images / evidence.modes[REAL].step
    alone = max(real, images / evidence.modes[RESIDENT].step)
    if noise > LOUDEST:
        advice = "use more --rounds, or a quieter machine"
        return f"Too noisy for a verdict: rounds differ by ±{noise:.0%}; {advice}."
    if cause in ("compute", "communication"):
        what = "the model's own work" if cause == "compute" else "communication between ranks"
        return (
            f"The limit is {what}{_dearest(evidence, cause)}: {real:,.0f} images/s, of at most {alone:,.0f} with data "
            f"for free (data costs {stall:.1%} of the step, rounds differ by ±{noise:.1%})."
        )
    share = costs[cause] / max(sum(costs.values()), 1e-12)
    named = {
        "store": "reading from the shards",
        "decode": "decoding",
        "augment": "making views",
        "plan": "planning views",
        "contention": "the loader and the model on the same cores",
    }[cause]
    return (
        f"Training waits for data in {stall:.0%} of the step, {share:.0%} of that because of {named}: "
        f"{real:,.0f} images/s, of at most {alone:,.0f} with data for free."
    )


def _dearest(evidence: Evidence, cause: str) -> str:
    """Returns the part of the model's work that takes most of the step, in words."""
    parts = {name: seconds for name, seconds in evidence.parts.items() if name not in ("data", UNNAMED)}
    if cause != "compute" or not parts:
        return ""
    name = max(parts, key=lambda part: parts[part])
    return f", most of it in {name.replace('_', ' ')} ({parts[name] / sum(evidence.parts.values()):.0%} of the step)"
