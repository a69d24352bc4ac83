"""Bars of a profile's page: where each begins and ends, in percent of its chart, and what is written beside it."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from maestri.profiler import figures
from maestri.profiler.figures import NOTHING
from maestri.profiler.findings import UNNAMED, Profile

OWNER_KINDS = {
    "teachers": ("module of", "average of"),
    "optimizer": ("masters", "moments"),
    "backward": ("gradient",),
    "student": ("parameters",),
}
"""Starts of an owner's name that tell whose memory it is; any other is of the rest."""
LARGEST_OWNER = 0.7
"""Share of the memory above which the other owners are drawn again without the largest."""
CUT = 2.5
"""Bars of the data path end at this multiple of what the model takes."""
NUM_TICKS = 6
"""Of the time axis, at most."""

Values = dict[str, Any]
"""What the page's template names."""


def modes_chart(profile: Profile) -> list[Values]:
    """Returns a bar for each mode, and for the loader alone."""
    longest = max(times.step for times in profile.modes.values())
    loader = figures.loader_rate(profile)
    if loader:
        longest = max(longest, profile.images / loader)
    found = []
    for name, times in profile.modes.items():
        wait = min(times.step, statistics.median(times.waits)) if times.waits else 0.0
        found.append(_mode(name, figures.MODE_MEANINGS.get(name, ""), times.step, wait, profile.images, longest))
    if loader:
        step = profile.images / loader
        found.append(_mode("loader", "the loader alone, without a model", step, step, profile.images, longest))
    return found


def _mode(name: str, meaning: str, step: float, wait: float, images: int, longest: float) -> Values:
    return {
        "name": name,
        "meaning": meaning,
        "value": f"{figures.milliseconds(step)} ms",
        "rate": f"{figures.rate(images / step)} images/s",
        "wait": _percent(wait, longest),
        "wait_ms": figures.milliseconds(wait),
        "rest": _percent(step - wait, longest),
    }


def ticks_up_to(end: float) -> list[float]:
    """Returns round numbers from 0 to ``end``, at most ``NUM_TICKS``."""
    rough = end / (NUM_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    return [step * number for number in range(int(end / step * (1 + 1e-9)) + 1)]


def timeline_chart(profile: Profile) -> Values:
    """Returns rows of the median step, the time axis, and the kinds of parts in it."""
    end = max((mark.end for mark in profile.timeline), default=0.0)
    if not end:
        return {"timeline": [], "ticks": [], "kinds": []}
    rows = figures.timeline_rows(profile.timeline)
    lines = []
    for row in rows:
        label = figures.label_of(row.name)
        seconds = sum(mark.end - mark.begin for mark in row.marks)
        times = f" in {len(row.marks)} times" if len(row.marks) > 1 else ""
        value = f"{figures.milliseconds(seconds, beside=end)} ms"
        bars = [
            {
                "begin": _percent(mark.begin, end),
                "width": _percent(mark.end - mark.begin, end),
                "title": f"{label}: {figures.milliseconds(mark.end - mark.begin)} ms, "
                f"from {figures.milliseconds(mark.begin)} ms",
            }
            for mark in row.marks
        ]
        indented = "\u2003" * row.depth + label
        lines.append({"label": indented, "value": value, "title": f"{label}: {value}{times}", "bars": bars})
        lines[-1]["colour"] = row.kind
    marks = [{"at": _percent(tick, 1e3 * end), "label": f"{tick:g} ms"} for tick in ticks_up_to(1e3 * end)]
    return {"timeline": lines, "ticks": marks, "kinds": list(dict.fromkeys(row.kind for row in rows))}


def parts_chart(rows: Sequence[figures.PartFigures]) -> list[Values]:
    """Returns a row for each part, with its bar."""
    longest = max((max(row.p95, row.median) for row in rows), default=0.0)
    return [
        {
            "label": row.label,
            "unnamed": row.name == UNNAMED,
            "colour": row.kind,
            "width": _percent(row.median, longest),
            "needed": _percent(row.median * min(1.0, row.utilisation), longest) if row.utilisation else 0,
            "whisker": min(99.7, _percent(row.p95, longest)),
            "ms": figures.milliseconds(row.median, beside=longest),
            "p95": figures.milliseconds(row.p95, beside=longest),
            "share": figures.share(row.share),
            "gflop": figures.giga(row.flops),
            "utilisation": figures.whole_share(row.utilisation),
            "rate": figures.rate(row.images_per_second),
        }
        for row in rows
    ]


def stages_chart(profile: Profile) -> Values:
    """Returns a bar for each stage, and where what the model takes lies among them."""
    demand, loader = figures.model_rate(profile), figures.loader_rate(profile)
    found = figures.stage_figures(profile)
    finite = [stage.limit for stage in found if stage.limit < math.inf]
    longest = max(finite, default=0.0)
    end = max(min(longest, CUT * demand), 1.1 * demand) if demand else longest
    stages = [
        {
            "name": stage.name,
            "note": f"{1e3 * stage.seconds_per_image:,.3g} ms an image, "
            f"{stage.threads} thread{'s' * (stage.threads != 1)}",
            "value": f"{figures.rate(stage.limit)} images/s" if stage.limit < math.inf else NOTHING,
            "width": _percent(min(stage.limit, end), end),
            "colour": "short" if demand and stage.limit < demand else "rest",
        }
        for stage in found
    ]
    return {
        "stages": stages,
        "demand": {"rate": figures.rate(demand), "at": _percent(demand, end)} if demand and stages else None,
        "loader": figures.rate(loader) if loader else "",
        "stages_cut": figures.rate(end) if longest > end else "",
    }


def memory_chart(owners: Mapping[str, int]) -> Values | None:
    """Returns bytes by owner, stacked; without the largest a second time, where the others would not be seen."""
    held = sorted(((name, kept) for name, kept in owners.items() if kept), key=lambda item: -item[1])
    if not held:
        return None
    total = sum(kept for _, kept in held)

    def kind_of(owner: str) -> str:
        return next((kind for kind, starts in OWNER_KINDS.items() if owner.startswith(starts)), "rest")

    def segments(shown: Sequence[tuple[str, int]]) -> list[Values]:
        whole, begin, found = sum(kept for _, kept in shown), 0, []
        for name, kept in shown:
            place = {"begin": _percent(begin, whole), "width": _percent(kept, whole)}
            value = f"{figures.size(kept)} · {figures.share(kept / total)}"
            found.append({**place, "label": figures.label_of(name), "value": value, "colour": kind_of(name)})
            begin += kept
        return found

    enlarged = segments(held[1:]) if held[0][1] > LARGEST_OWNER * total and len(held) > 2 else []
    return {
        "total": figures.size(total),
        "kinds": list(dict.fromkeys(kind_of(name) for name, _ in held)),
        "segments": segments(held),
        "enlarged": enlarged,
        "largest": figures.label_of(held[0][0]),
        "others": figures.size(total - held[0][1]),
    }


def memory_curve_chart(profile: Profile) -> Values | None:
    """Returns a bar for each moment of a step's memory, as wide as it lasts, and the time axis."""
    moments = profile.memory_curve
    if len(moments) < 2:
        return None
    end, most = moments[-1].seconds, max(moment.bytes for moment in moments)
    bars = [
        {
            "begin": _percent(moment.seconds, end),
            "width": _percent(following.seconds - moment.seconds, end),
            "height": _percent(moment.bytes, most),
            "colour": figures.kind_of(moment.part),
            "title": f"{figures.size(moment.bytes)} in {figures.label_of(moment.part)}, "
            f"at {figures.milliseconds(moment.seconds)} ms",
        }
        for moment, following in zip(moments[:-1], moments[1:], strict=True)
    ]
    peak = max(moments, key=lambda moment: moment.bytes)
    ticks = [{"at": _percent(tick, 1e3 * end), "label": f"{tick:g} ms"} for tick in ticks_up_to(1e3 * end)]
    return {
        "bars": bars,
        "ticks": ticks,
        "kinds": list(dict.fromkeys(bar["colour"] for bar in bars)),
        "most": figures.size(most),
        "peak": f"{figures.size(peak.bytes)}, {figures.milliseconds(peak.seconds)} ms after the step’s begin, in "
        f"{figures.label_of(peak.part)}",
    }


def peaks_chart(profile: Profile) -> list[Values]:
    """Returns a bar for each part of the step."""
    most = max(profile.memory_peak.values(), default=0)
    return [
        {
            "label": figures.label_of(name),
            "value": figures.size(held),
            "width": _percent(held, most),
            "most": held == most,
        }
        for name, held in profile.memory_peak.items()
    ]


def _percent(value: float, whole: float) -> float:
    return round(100 * value / whole, 3) if whole else 0.0
