"""What changed between two profiles, and whether it is more than noise."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from scipy.stats import false_discovery_control, mannwhitneyu, ttest_ind

from maestri.profiler import figures
from maestri.profiler.findings import REAL, RESIDENT, Profile

LEVEL = 0.05
"""Share of comparisons of like with like in which a change may be called."""
FEWEST_ROUNDS = 2
"""Of each profile; with fewer there is no telling."""
LEAST_MEMORY = 0.01
"""Share by which an owner's memory must differ at least."""
LEAST_BYTES = 1_000_000
"""By which it must differ, at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A figure in both profiles."""

    name: str
    """e.g. ``step, real`` or a part's name."""
    before: float
    """Seconds, a share or bytes, in A; the median over rounds."""
    after: float
    """The same in B."""
    probability: float | None = None
    """Of a difference as large where nothing changed; None where rounds are too few to tell."""
    called: bool = False
    """Whether it is more than noise."""

    @property
    def difference(self) -> float:
        """What B has more."""
        return self.after - self.before


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What differs between two profiles, A and B."""

    mode: str
    """The mode of ``step``."""
    step: Change
    """Seconds of a step in it."""
    images_per_second: tuple[float, float]
    """In it."""
    modes: Sequence[Change]
    """Seconds of a step in the other modes that both have."""
    stall: Change | None
    """Share of the real step that is not the model's; None where a mode is missing."""
    parts: Sequence[Change]
    """Seconds in a step, the largest difference first."""
    memory: Sequence[Change]
    """Bytes by owner."""
    noise: float
    """Relative difference below which nothing is called."""
    warnings: Sequence[str]
    """Why the two may not be comparable."""

    @property
    def sentence(self) -> str:
        """All of it in one sentence."""
        step = self.step
        times = f"{figures.milliseconds(step.before)} → {figures.milliseconds(step.after)} ms a step"
        times += f" ({figures.percent_more(step.before, step.after)}, noise ± {figures.share(self.noise)})"
        called = [part for part in self.parts if part.called]
        if step.probability is None:
            return f"Too few rounds to tell: {times}."
        if not step.called:
            others = ", ".join(figures.label_of(part.name) for part in called)
            return f"No change of the step beyond noise: {times}" + (
                f"; but parts changed: {others}." if others else "."
            )
        causes = [part for part in called if part.difference * step.difference > 0]
        most = ""
        if causes:
            is_most = abs(causes[0].difference) >= abs(step.difference) / 2
            spread = "most of it in" if is_most else f"spread over {len(causes)} parts, the most in"
            most = f"; {spread} {_part_difference(causes[0])}"
        return f"B is {'slower' if step.difference > 0 else 'faster'}: {times}{most}."


def compare(before: Profile, after: Profile) -> Comparison:
    """Returns what changed from A, ``before``, to B, ``after``.

    The rule.  Steps within a round share what the machine did meanwhile, so a round gives one value: the mean of its
    steps.  Two figures are the medians of their rounds.  Their difference is more than noise where both hold:

    - it is larger, relative to A, than the ``noise`` of either profile;
    - rounds like these would differ so in fewer than 5 % of cases (``LEVEL``): by a Mann–Whitney test, which one bad
      round does not mislead; with so few rounds that it could not reach that level for one figure among all, by Welch's
      t-test.  The step in the main mode is tested alone; all others are tested together, their probabilities
      adjusted for their number (Benjamini–Hochberg), so that one figure in many does not differ by chance.

    With a single round nothing is called.  Memory differs where an owner has 1 % and 1 MB more or less.

    Raises:
        ValueError: the two have no mode in common.
    """
    common = [name for name in before.modes if name in after.modes]
    if not common:
        raise ValueError(f"they have no mode in common: {', '.join(before.modes)} and {', '.join(after.modes)}")
    mode = REAL if REAL in common else common[0]
    noise = max(before.noise, after.noise)
    samples = {name: (before.modes[name].means, after.modes[name].means) for name in common}
    step = _tested({mode: samples.pop(mode)}, noise)[mode]
    stalls = _stalls(before), _stalls(after)
    parts = _part_samples(before), _part_samples(after)
    family = {
        **{f"mode {name}": pair for name, pair in samples.items()},
        **({"stall": (stalls[0], stalls[1])} if stalls[0] and stalls[1] else {}),
        **{f"part {name}": (parts[0].get(name, [0.0]), parts[1].get(name, [0.0])) for name in {**parts[0], **parts[1]}},
    }
    found = _tested(family, noise)
    return Comparison(
        mode=mode,
        step=step,
        images_per_second=(before.images / step.before, after.images / step.after),
        modes=_of_family(found, "mode "),
        stall=found.get("stall"),
        parts=sorted(_of_family(found, "part "), key=lambda part: -abs(part.difference)),
        memory=_memory_changes(before.memory, after.memory),
        noise=noise,
        warnings=list(_warnings(before, after)),
    )


def _tested(family: Mapping[str, tuple[Sequence[float], Sequence[float]]], noise: float) -> dict[str, Change]:
    """Returns the changes of figures that are tested together, each given by its rounds in A and in B."""
    raw = {
        name: _probability(one, other, num_compared=len(family))
        for name, (one, other) in family.items()
        if min(len(one), len(other)) >= FEWEST_ROUNDS
    }
    adjusted = dict(zip(raw, false_discovery_control(list(raw.values())), strict=True)) if raw else {}
    found = {}
    for name, (one, other) in family.items():
        middles = statistics.median(one), statistics.median(other)
        probability = float(adjusted[name]) if name in adjusted else None
        apart = abs(middles[1] - middles[0]) > noise * (1.0 if name == "stall" else abs(middles[0]))
        called = probability is not None and probability < LEVEL and apart
        found[name] = Change(name=name, before=middles[0], after=middles[1], probability=probability, called=called)
    return found


def _probability(one: Sequence[float], other: Sequence[float], *, num_compared: int) -> float:
    """Returns the two-sided probability that samples of one distribution differ so."""
    largest = max(map(abs, (*one, *other)))
    if all(max(sample) - min(sample) <= 1e-9 * largest for sample in (one, other)):  # no spread: a test has no answer
        return 1.0 if abs(one[0] - other[0]) <= 1e-9 * largest else 0.0
    finest = 2 / math.comb(len(one) + len(other), len(one))
    if finest * num_compared < LEVEL:
        return float(mannwhitneyu(one, other).pvalue)
    return float(ttest_ind(one, other, equal_var=False).pvalue)


def _stalls(profile: Profile) -> list[float]:
    """Returns the stall of each round; empty where a mode is missing."""
    if REAL not in profile.modes or RESIDENT not in profile.modes:
        return []
    pairs = zip(profile.modes[REAL].means, profile.modes[RESIDENT].means, strict=False)
    return [1 - resident / real for real, resident in pairs]


def _part_samples(profile: Profile) -> dict[str, list[float]]:
    """Returns each part's mean seconds in a step, by round of the mode ``REAL``.

    Where a part's steps are not those of the rounds, they are cut into as many stretches.
    """
    lengths = [len(of_round) for of_round in profile.modes[REAL].seconds] if REAL in profile.modes else []
    found = {}
    for part in profile.parts:
        if not part.seconds:
            continue
        sizes = lengths
        if sum(lengths) != len(part.seconds):
            number = min(max(1, len(lengths)), len(part.seconds))
            sizes = [len(part.seconds) * (k + 1) // number - len(part.seconds) * k // number for k in range(number)]
        begin, means = 0, []
        for length in sizes:
            if length:
                means.append(statistics.fmean(part.seconds[begin : begin + length]))
            begin += length
        found[part.name] = means
    return found


def _memory_changes(before: Mapping[str, int], after: Mapping[str, int]) -> list[Change]:
    """Returns every owner's, the largest difference first."""
    found = []
    for name in {**before, **after}:
        pair = before.get(name, 0), after.get(name, 0)
        called = abs(pair[1] - pair[0]) > max(LEAST_BYTES, LEAST_MEMORY * pair[0])
        found.append(Change(name=name, before=pair[0], after=pair[1], called=called))
    return sorted(found, key=lambda change: -abs(change.difference))


def _of_family(found: Mapping[str, Change], start: str) -> list[Change]:
    return [replace(change, name=name.removeprefix(start)) for name, change in found.items() if name.startswith(start)]


def _warnings(before: Profile, after: Profile) -> Iterator[str]:
    if before.title != after.title:
        yield f"different recipes or devices: {before.title} | {after.title}"
    for what, pair in (
        ("hardware", (before.hardware, after.hardware)),
        ("settings", (before.settings, after.settings)),
    ):
        for name in {**pair[0], **pair[1]}:
            one, other = (values.get(name, figures.NOTHING) for values in pair)
            if one != other:
                yield f"different {what}: {name} is {one} | {other}"
    if before.world_size != after.world_size:
        yield f"different numbers of ranks: {before.world_size} | {after.world_size}"
    if before.images != after.images:
        yield f"different images per step: {before.images} | {after.images}; compare images/s, not times"
    for name, profile in (("A", before), ("B", after)):
        if not profile.complete:
            yield f"{name} was interrupted"


def _part_difference(part: Change) -> str:
    label, more = figures.label_of(part.name), 1e3 * part.difference
    return f"{label} ({more:+.{1 if abs(more) >= 10 else 2}f} ms)"
