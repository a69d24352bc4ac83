"""What a profile found, as plain data: measured figures, and what follows from them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

REAL = "real"
"""The run's own loader, and shards as they lie: what training does."""
RESIDENT = "resident"
"""One batch, on the device, again and again: what the model alone could do."""
CACHED = "cached"
"""As ``REAL``, with the stored bytes in the page cache."""
COLD = "cold"
"""As ``REAL``, with the stored bytes out of the page cache."""
CROWDED = "crowded"
"""As ``RESIDENT``, with the loader at work beside it on batches that nobody takes from it but a thread."""
MODES = (REAL, RESIDENT, CACHED, COLD, CROWDED)

UNNAMED = "other"
"""The part of a step that no name covers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeTimes:
    """Times of optimizer steps in one mode."""

    seconds: Sequence[Sequence[float]]
    """Of each step, by round; of the slowest rank."""
    waits: Sequence[float]
    """Seconds a step waited for data, by round; of rank 0."""

    @property
    def median(self) -> float:
        """Median step, seconds."""
        return statistics.median(value for of_round in self.seconds for value in of_round)

    @property
    def means(self) -> list[float]:
        """Mean step of each round, seconds: stalls come in lumps, and a median would pass over them."""
        return [statistics.fmean(of_round) for of_round in self.seconds]

    @property
    def step(self) -> float:
        """The median over rounds of a round's mean step, seconds."""
        return statistics.median(self.means)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A named part of the step."""

    name: str
    """e.g. ``labelling_teacher``, ``encoder backward``, ``data``."""
    seconds: Sequence[float]
    """In each step of the mode ``REAL``; on this part alone, not what is named inside it."""
    flops: int = 0
    """Per step, on this rank."""

    @property
    def median(self) -> float:
        """Median over steps, seconds."""
        return statistics.median(self.seconds)

    @property
    def p95(self) -> float:
        """95 % of steps have no more, seconds."""
        return sorted(self.seconds)[max(0, -(-95 * len(self.seconds) // 100) - 1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A part's stretch of time inside one step."""

    name: str
    """The part's."""
    begin: float
    """Seconds after the step's begin."""
    end: float
    """The same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stage of the data path."""

    name: str
    """e.g. ``decode``."""
    seconds_per_image: float
    """On one thread."""
    threads: int
    """That work on it, on a rank."""
    pool: str = ""
    """Name of the threads, where they work on other stages too."""
    busy_seconds_per_image: float | None = None
    """Of a core, without what the stage waits for; None where that is not known, and all of it counts."""

    @property
    def busy(self) -> float:
        """Seconds an image takes of a core."""
        known = self.busy_seconds_per_image
        return self.seconds_per_image if known is None else known

    @property
    def limit(self) -> float:
        """Images per second on a rank, if all its threads did nothing else."""
        return self.threads / self.seconds_per_image if self.seconds_per_image else float("inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """Memory at one moment of a step."""

    seconds: float
    """After the step's begin, on the host's clock."""
    bytes: int
    """That tensors take on the model's device."""
    part: str
    """That runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wait:
    """A call of the step that needs a tensor's values on the host: on a GPU it waits for all work before it."""

    place: str
    """File and line of the innermost call outside of torch."""
    operation: str
    """What is called: ``item``, ``nonzero`` …"""
    count: int
    """Times in a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """What removing a cause would give."""

    cause: str
    """``store``, ``decode``, ``augment``, ``transfer``, ``contention``, ``data``, ``compute`` or ``communication``."""
    images_per_second: float
    """Expected afterwards."""
    knob: str
    """What to turn."""
    checked: float | None = None
    """Images per second that an experiment gave; None where none could be run."""
    experiment: str = ""
    """What was run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSummary:
    """One rank's own times."""

    rank: int
    """Its number."""
    parts: Mapping[str, float]
    """Median seconds by part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """All of it."""

    title: str
    """The recipe, method and device."""
    hardware: Mapping[str, str]
    """What it ran on: ``cpu``, ``gpu``, ``cores``, ``torch`` …"""
    images: int
    """Per optimizer step, over all ranks."""
    world_size: int
    """Ranks."""
    modes: Mapping[str, ModeTimes]
    """By name, those of ``MODES`` that were measured."""
    loader_images_per_second: Sequence[float]
    """Of the loader alone, over all ranks, by round."""
    parts: Sequence[Part]
    """Of rank 0, the dearest first."""
    timeline: Sequence[Mark]
    """Of rank 0's median step in the mode ``REAL``, in their order."""
    stages: Sequence[Stage]
    """Of the data path, in its order."""
    ranks: Sequence[RankSummary]
    """Every rank's own times."""
    flops_per_second: float
    """Of a large matrix product here, in the compute dtype."""
    bytes_per_second: float
    """Of a stream through memory here."""
    memory: Mapping[str, int]
    """Bytes on rank 0 by owner; on a GPU of the device, else of the host."""
    memory_peak: Mapping[str, int]
    """Bytes allocated at most, by part of the step; empty where that is not known."""
    host_memory: Mapping[str, int]
    """Bytes of the host by process or kind (``rank 0``, ``worker 1234``, ``data path``, ``pinned``, ``page cache``)."""
    stall: float
    """Share of the real step that is not the model's: 1 − resident / real."""
    cause: str
    """Of the stall, or of the step where there is next to none."""
    gains: Sequence[Gain]
    """What to expect, the most first."""
    noise: float
    """Relative deviation of rounds from each other; differences below are not told apart."""
    verdict: str
    """One sentence."""
    growth: float = 0.0
    """Bytes by which memory grows each step on a resident batch: of the device, or of the host's process."""
    complete: bool = True
    """False where it was interrupted and shows what was measured until then."""
    memory_curve: Sequence[Moment] = ()
    """Memory over a step of rank 0, the moments of the most among it; empty where that was not followed."""
    waits: Sequence[Wait] = ()
    """What makes the host wait for the device in a step of rank 0, the most often first."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What a step depends on and a user chose: ``precision``, ``workers``, ``executor``, ``commit`` …"""

    @property
    def images_per_second(self) -> float:
        """In the mode ``REAL``, or else in the first that was measured."""
        found = self.modes.get(REAL) or next(iter(self.modes.values()))
        return self.images / found.step

    def as_json(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        return asdict(self)


def from_json(values: Any) -> Profile:
    """Returns the profile of ``as_json``'s result.

    Raises:
        ValueError: it is of another form; names the first field that is missing or of another type.
    """
    try:
        return _reader().validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"]) or "the whole"
        raise ValueError(f"not a profile of this version: {where}: {first['msg']}") from None


@cache
def _reader() -> TypeAdapter[Profile]:
    return TypeAdapter(Profile)
