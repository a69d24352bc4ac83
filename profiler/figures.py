"""What a profile's readers are shown: figures that follow from the measured ones, and how they are written."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from maestri.profiler.findings import (
    CACHED,
    COLD,
    CROWDED,
    REAL,
    RESIDENT,
    UNNAMED,
    Gain,
    Mark,
    Profile,
    RankSummary,
    Stage,
)

NOTHING = "–"

MODE_MEANINGS = {
    REAL: "what training does",
    RESIDENT: "the model alone: one batch that stays on the device",
    CACHED: "training, stored bytes in the page cache: no store",
    COLD: "training, stored bytes not in the page cache",
    CROWDED: "the model alone, with the loader at work beside it",
}

KINDS = {
    "data": ("data", "transfer", "load"),
    "communication": ("reduce", "gather", "communication"),
    "teachers": ("teacher", "averages", "collapse"),
    "backward": ("backward",),
    "optimizer": ("optimizer", "clip"),
    "rest": (UNNAMED, "monitor", "checkpoint", "evaluation", "start", "stop"),
}
"""Words in a part's name that tell its kind, the first that fits; any other part is the student's."""
STUDENT = "student"
IDLE = ("data", UNNAMED)
"""Parts in which the model does nothing: a rate of theirs would mislead."""
LEAST_GAIN = 0.01
"""Share of the rate that a gain adds at least, to be told."""
LEAST_EXCESS = 0.02
"""Share by which a straggler's own time exceeds the ranks' median, at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartFigures:
    """A row of the table of parts."""

    name: str
    """As in the profile."""
    kind: str
    """A key of ``KINDS``, or ``STUDENT``."""
    median: float
    """Seconds."""
    p95: float
    """Seconds."""
    share: float
    """Of all steps' time."""
    flops: int
    """Per step, on this rank."""
    utilisation: float | None
    """Share of the measured peak; None without FLOPs."""
    images_per_second: float | None
    """That the part could reach alone, over all ranks; None of what does no work: the wait and the rest."""

    @property
    def label(self) -> str:
        """The name for people."""
        return label_of(self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFigures:
    """A row of the table of stages."""

    name: str
    """The stage's, or the stages' that share threads."""
    seconds_per_image: float
    """On one thread."""
    threads: int
    """Of a rank."""
    limit: float
    """Images per second, over all ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimelineRow:
    """A part's marks."""

    name: str
    """The part's."""
    kind: str
    """A key of ``KINDS``, or ``STUDENT``."""
    depth: int
    """Marks around its first one."""
    marks: Sequence[Mark]
    """In their order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Straggler:
    """The rank that others wait for."""

    rank: int
    """Its number."""
    part: str
    """Where it loses most."""
    excess: float
    """Seconds of its own above the ranks' median, per step."""


def kind_of(name: str) -> str:
    """Returns the kind of a part by its name."""
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), STUDENT)


def label_of(name: str) -> str:
    """Returns a part's name for people."""
    return "unnamed rest" if name == UNNAMED else name.replace("_", " ")


def part_figures(profile: Profile) -> list[PartFigures]:
    """Returns the parts, the dearest first and the unnamed rest last."""
    total = sum(statistics.fmean(part.seconds) for part in profile.parts if part.seconds)
    found = []
    for part in profile.parts:
        if not part.seconds:
            continue
        median = part.median
        found.append(
            PartFigures(
                name=part.name,
                kind=kind_of(part.name),
                median=median,
                p95=part.p95,
                share=statistics.fmean(part.seconds) / total if total else 0.0,
                flops=part.flops,
                utilisation=part.flops / median / profile.flops_per_second if part.flops and median else None,
                images_per_second=profile.images / median if median and part.name not in IDLE else None,
            )
        )
    return sorted(found, key=lambda row: (row.name == UNNAMED, -row.share))


def coverage(rows: Sequence[PartFigures]) -> float:
    """Returns the share of the time that has a name."""
    return sum(row.share for row in rows if row.name != UNNAMED)


def stage_figures(profile: Profile) -> list[StageFigures]:
    """Returns the stages, and behind the last of those that share threads what they can do together."""
    found = []
    for number, stage in enumerate(profile.stages):
        found.append(_stage(profile, stage.name, stage))
        shared = [other for other in profile.stages if stage.pool and other.pool == stage.pool]
        if len(shared) > 1 and all(other.pool != stage.pool for other in profile.stages[number + 1 :]):
            seconds = sum(other.seconds_per_image for other in shared)
            found.append(_stage(profile, f"together: {stage.pool}", replace(stage, seconds_per_image=seconds)))
    return found


def _stage(profile: Profile, name: str, stage: Stage) -> StageFigures:
    return StageFigures(
        name=name,
        seconds_per_image=stage.seconds_per_image,
        threads=stage.threads,
        limit=stage.limit * profile.world_size,
    )


def timeline_rows(marks: Sequence[Mark]) -> list[TimelineRow]:
    """Returns a row for each part, by when it begins first."""
    first_depth: dict[str, int] = {}
    by_name: dict[str, list[Mark]] = {}
    around: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: (mark.begin, -mark.end)):
        while around and around[-1].end <= mark.begin:
            around.pop()
        first_depth.setdefault(mark.name, len(around))
        by_name.setdefault(mark.name, []).append(mark)
        around.append(mark)
    return [
        TimelineRow(name=name, kind=kind_of(name), depth=first_depth[name], marks=found)
        for name, found in by_name.items()
    ]


def straggler(profile: Profile) -> Straggler | None:
    """Returns the rank that others wait for, None where ranks are alike.

    A rank's own time is that of all parts but those where ranks wait for each other: communication where it has a
    name, else the backward pass and the optimizer, which hold it.
    """
    if len(profile.ranks) < 2:
        return None
    kinds = {kind_of(name) for summary in profile.ranks for name in summary.parts}
    waiting = ("communication",) if "communication" in kinds else ("backward", "optimizer")

    def own_parts(summary: RankSummary) -> Mapping[str, float]:
        return {name: seconds for name, seconds in summary.parts.items() if kind_of(name) not in waiting}

    own = {summary.rank: own_parts(summary) for summary in profile.ranks}
    sums = {rank: sum(parts.values()) for rank, parts in own.items()}
    slowest = max(sums, key=lambda rank: sums[rank])
    middle = statistics.median(sums.values())
    excess = sums[slowest] - middle
    if not own[slowest] or excess <= max(LEAST_EXCESS, profile.noise) * middle:
        return None
    losses = {
        name: seconds - statistics.median(parts.get(name, 0.0) for parts in own.values())
        for name, seconds in own[slowest].items()
    }
    return Straggler(rank=slowest, part=max(losses, key=lambda name: losses[name]), excess=excess)


def loader_rate(profile: Profile) -> float | None:
    """Returns images per second of the loader alone: the median over rounds; None where it was not measured."""
    return statistics.median(profile.loader_images_per_second) if profile.loader_images_per_second else None


def model_rate(profile: Profile) -> float | None:
    """Returns images per second that the model could take; None where it was not measured."""
    return profile.images / profile.modes[RESIDENT].step if RESIDENT in profile.modes else None


def gain_of(profile: Profile, gain: Gain) -> str:
    """Returns what a gain adds to the rate, e.g. ``+12.0 %``; said to be noise where rounds differ by as much."""
    more = gain.images_per_second / profile.images_per_second - 1
    return percent_more(1.0, 1.0 + more) if more > max(profile.noise, LEAST_GAIN) else "within noise"


def milliseconds(seconds: float, *, beside: float = 0.0) -> str:
    """Returns e.g. ``48.2``; with as many digits as ``beside``, the largest of a column, needs."""
    largest = 1e3 * max(seconds, beside)
    return f"{1e3 * seconds:,.{0 if largest >= 1000 else 1 if largest >= 10 else 2}f}"


def rate(images_per_second: float | None) -> str:
    """Returns e.g. ``4,785``."""
    if images_per_second is None or images_per_second == float("inf"):
        return NOTHING
    return f"{images_per_second:,.0f}" if images_per_second >= 100 else f"{images_per_second:,.1f}"


def giga(flops: int) -> str:
    """Returns e.g. ``1,240`` or ``0.31``, of 10⁹."""
    value = flops / 1e9
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}" if flops else NOTHING


def size(num_bytes: float) -> str:
    """Returns e.g. ``7.32 GB``."""
    if num_bytes < 1e9:
        return f"{num_bytes / 1e6:,.1f} MB"
    return f"{num_bytes / 1e9:,.{1 if num_bytes >= 1e10 else 2}f} GB"


def share(value: float) -> str:
    """Returns e.g. ``23.4 %``."""
    return f"{100 * value:.1f} %"


def whole_share(value: float | None) -> str:
    """Returns e.g. ``23 %``."""
    return NOTHING if value is None else f"{100 * value:.0f} %"


def percent_more(before: float, after: float) -> str:
    """Returns e.g. ``+12.0 %``."""
    return f"{100 * (after / before - 1):+.1f} %" if before else NOTHING
