"""A profile as one HTML page that needs nothing else: no network, no script, no font."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from maestri.profiler import charts, figures
from maestri.profiler.figures import NOTHING
from maestri.profiler.findings import REAL, Profile
from maestri.profiler.terminal import rank_rows, straggler_line


def write_page(profile: Profile, path: Path) -> None:
    """Writes the page.

    Raises:
        OSError: it could not be written.
    """
    path.write_text(as_page(profile), encoding="utf-8")


def as_page(profile: Profile) -> str:
    """Returns the page as HTML."""
    files = resources.files("maestri.profiler")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["rate"] = figures.rate
    template = environment.from_string((files / "page.html.jinja").read_text(encoding="utf-8"))
    rows = figures.part_figures(profile)
    return template.render(
        css=Markup((files / "page.css").read_text(encoding="utf-8")),
        profile=profile,
        nothing=NOTHING,
        cards=_cards(profile, rows),
        gains=_gains(profile),
        modes=charts.modes_chart(profile),
        parts=charts.parts_chart(rows),
        coverage=figures.share(figures.coverage(rows)),
        peaks=charts.peaks_chart(profile),
        curve=charts.memory_curve_chart(profile),
        memory=charts.memory_chart(profile.memory),
        ranks=_ranks(profile),
        straggler=straggler_line(profile)[:1].upper() + straggler_line(profile)[1:] + ".",
        limits=_limits(profile),
        host={figures.label_of(name): figures.size(kept) for name, kept in profile.host_memory.items()},
        **charts.timeline_chart(profile),
        **charts.stages_chart(profile),
    )


def _cards(profile: Profile, rows: Sequence[figures.PartFigures]) -> list[charts.Values]:
    step = (profile.modes.get(REAL) or next(iter(profile.modes.values()))).step
    cards = [
        {"label": "training", "value": figures.rate(profile.images_per_second), "unit": "images/s"},
        {"label": "a step", "value": figures.milliseconds(step), "unit": f"ms ± {figures.share(profile.noise)}"},
        {"label": "not the model’s", "value": figures.share(profile.stall), "unit": "of the step"},
        {"label": "cause", "value": profile.cause, "unit": ""},
    ]
    model = figures.model_rate(profile)
    if model is not None:
        cards.append({"label": "the model alone", "value": figures.rate(model), "unit": "images/s"})
    flops = sum(row.flops for row in rows)
    if flops and profile.flops_per_second:
        reached = flops / step / profile.flops_per_second
        cards.append({"label": "of the peak", "value": figures.share(reached), "unit": "of FLOP/s measured"})
    return cards


def _gains(profile: Profile) -> list[charts.Values]:
    return [
        {
            "cause": gain.cause,
            "expected": figures.rate(gain.images_per_second),
            "more": figures.gain_of(profile, gain),
            "checked": figures.rate(gain.checked),
            "knob": gain.knob,
            "experiment": gain.experiment,
        }
        for gain in profile.gains
    ]


def _ranks(profile: Profile) -> list[charts.Values]:
    if len(profile.ranks) < 2:
        return []
    rows = list(rank_rows(profile))
    return [
        {
            "label": figures.label_of(name),
            **{
                key: figures.milliseconds(seconds, beside=rows[0][3])
                for key, seconds in (("least", low), ("median", middle), ("most", high))
            },
            "rank": str(rank),
            "more": figures.percent_more(middle, high),
            "apart": high > middle * (1 + max(0.05, profile.noise)),
        }
        for name, low, middle, high, rank in rows
    ]


def _limits(profile: Profile) -> dict[str, str]:
    found = {}
    if profile.flops_per_second:
        found["matrix product"] = f"{profile.flops_per_second / 1e12:,.2f} TFLOP/s"
    if profile.bytes_per_second:
        found["memory stream"] = f"{profile.bytes_per_second / 1e9:,.1f} GB/s"
    return found
