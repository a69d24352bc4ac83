"""What none, one and two teachers cost, as figures and as a sentence."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from maestri.profiler.peak import Peak

LARGEST_RATIO = 1.1
"""Aim: the second teacher's share of the time, as a multiple of its share of the FLOPs."""
LARGEST_AVERAGING = 0.03
"""Aim: the averages' share of a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantCost:
    """What was measured of a number of teachers."""

    seconds: Sequence[Sequence[float]]
    """Of each optimizer step, by round; of the slowest rank."""
    spans: Sequence[Mapping[str, float]]
    """Seconds of each part of the step, summed over a round's steps, by round; of rank 0."""
    flops: Mapping[str, int]
    """Of an optimizer step of all ranks, by part."""
    bytes: Mapping[str, int]
    """Kept between steps on rank 0, by owner."""
    peak_bytes: int
    """On a GPU: what it keeps, and the most that its steps allocate on top; 0 on a CPU."""

    @property
    def step_seconds(self) -> float:
        """Median step."""
        return statistics.median(self._all)

    @property
    def p95_seconds(self) -> float:
        """Step that 95 % of steps are not slower than."""
        return sorted(self._all)[max(0, -(-95 * len(self._all) // 100) - 1)]

    @property
    def round_seconds(self) -> list[float]:
        """Median step of each round."""
        return [statistics.median(of_round) for of_round in self.seconds]

    @property
    def total_flops(self) -> int:
        """Of an optimizer step of all ranks."""
        return sum(self.flops.values())

    @property
    def teachers_flops(self) -> int:
        """Of them, the teachers' and those of making targets of what they say."""
        return sum(flops for part, flops in self.flops.items() if "teacher" in part)

    @property
    def averages_seconds(self) -> float:
        """Of all averages and their copies in a step: the median over rounds."""
        return statistics.median(self._averages())

    @property
    def averages_share(self) -> float:
        """Of a step's time: the median over rounds."""
        totals = [sum(of_round) / len(of_round) for of_round in self.seconds]
        return statistics.median(part / total for part, total in zip(self._averages(), totals, strict=True))

    @property
    def _all(self) -> list[float]:
        return [seconds for of_round in self.seconds for seconds in of_round]

    def _averages(self) -> list[float]:
        return [
            spans.get("averages", 0.0) / len(of_round) for spans, of_round in zip(self.spans, self.seconds, strict=True)
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class TeachersCost:
    """What no, one and two teachers cost."""

    variants: Mapping[str, VariantCost]
    """By the names in ``VARIANTS``."""
    peak: Peak
    """The limits of this process's device, measured before."""
    images: int
    """Per optimizer step."""
    world_size: int
    """Ranks."""
    device: str
    """Its kind."""
    precision: str
    """Of the computation."""
    resident_bytes: int
    """The most memory that rank 0's process has had resident: all variants are in it."""

    @property
    def time_shares(self) -> list[float]:
        """The second teacher's share of a step with two, by round."""
        pairs = zip(self.variants["one"].round_seconds, self.variants["two"].round_seconds, strict=True)
        return [(two - one) / two for one, two in pairs]

    @property
    def time_share(self) -> float:
        """The second teacher's share of the time of a step with two: the median over rounds."""
        return statistics.median(self.time_shares)

    @property
    def flop_share(self) -> float:
        """The second teacher's share of the FLOPs of a step with two."""
        one, two = (self.variants[name].total_flops for name in ("one", "two"))
        return (two - one) / two

    @property
    def ratio(self) -> float:
        """The share of the time as a multiple of the share of the FLOPs."""
        return self.time_share / self.flop_share

    @property
    def ratio_quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile of the ratio over rounds."""
        lower, _, upper = statistics.quantiles((share / self.flop_share for share in self.time_shares), n=4)
        return lower, upper

    def verdict(self) -> str:
        """Returns what it comes to, as a sentence."""
        averaging = self.variants["two"].averages_share
        ratio_kept, averaging_kept = (
            "within" if kept else "above" for kept in (self.ratio <= LARGEST_RATIO, averaging <= LARGEST_AVERAGING)
        )
        lower, upper = self.ratio_quartiles
        return (
            f"The second teacher takes {self.time_share:.1%} of a step for {self.flop_share:.1%} of its FLOPs, "
            f"{self.ratio:.2f} × its share (quartiles of rounds {lower:.2f} and {upper:.2f}), {ratio_kept} the aim of "
            f"{LARGEST_RATIO} ×; averaging both teachers takes {averaging:.2%} of a step, {averaging_kept} the aim of "
            f"{LARGEST_AVERAGING:.0%}."
        )

    def as_json(self) -> dict[str, Any]:
        """Returns everything measured, and what it comes to, as plain values."""
        shares = {"time": self.time_share, "time_by_round": self.time_shares, "flops": self.flop_share}
        found = asdict(self)
        for name, variant in self.variants.items():
            found["variants"][name] |= {
                "median_ms": 1e3 * variant.step_seconds,
                "p95_ms": 1e3 * variant.p95_seconds,
                "images_per_second": self.images / variant.step_seconds,
                "averages_ms": 1e3 * variant.averages_seconds,
                "averages_share": variant.averages_share,
                "total_flops": variant.total_flops,
                "teachers_flops": variant.teachers_flops,
            }
        ratio = {"median": self.ratio, "quartiles": self.ratio_quartiles, "aim": LARGEST_RATIO}
        return found | {"second_teacher": {"shares": shares, "ratio": ratio}, "verdict": self.verdict()}
