"""A profile for a terminal of 100 columns: the verdict first, then tables of what it rests on."""

import statistics
from collections.abc import Iterator, Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from maestri.profiler import figures
from maestri.profiler.figures import NOTHING
from maestri.profiler.findings import REAL, UNNAMED, Profile

Column = tuple[str, bool]
"""A heading, and whether it holds words, which may wrap, and not figures."""


def report(profile: Profile) -> Group:
    """Returns everything that is known, the sentence of verdict first; what was not measured has no table."""
    blocks: list[RenderableType] = [Text(profile.verdict, style="bold"), Text(_headline(profile))]
    if not profile.complete:
        blocks.append(Text("Interrupted: this is what was measured until then.", style="yellow"))
    tables = (
        modes_table(profile),
        parts_table(profile),
        stages_table(profile),
        gains_table(profile),
        memory_table(profile),
        waits_table(profile),
        ranks_table(profile),
    )
    return Group(*blocks, *(Padding(table, (1, 0, 0, 0)) for table in tables if table is not None))


def modes_table(profile: Profile) -> Table:
    """Returns step and rate of each mode, the wait in it, and what it tells; the loader alone below."""
    table = _table("modes", ("", True), ("step, ms", False), ("waits, ms", False), ("images/s", False), ("tells", True))
    for name, times in profile.modes.items():
        wait = statistics.median(times.waits) if times.waits else 0.0
        table.add_row(
            name,
            figures.milliseconds(times.step),
            figures.milliseconds(wait) if wait else NOTHING,
            figures.rate(profile.images / times.step),
            figures.MODE_MEANINGS.get(name, ""),
        )
    loader = figures.loader_rate(profile)
    if loader is not None:
        table.add_row(
            "loader", figures.milliseconds(profile.images / loader), NOTHING, figures.rate(loader), "the loader alone"
        )
    return table


def parts_table(profile: Profile) -> Table | None:
    """Returns what each part of rank 0's step takes, the dearest first, the unnamed rest last."""
    rows = figures.part_figures(profile)
    if not rows:
        return None
    headings = ("ms, median", "p95", "of the step", "GFLOP", "of the peak", "alone, images/s")
    table = _table("parts of the step, rank 0", ("", True), *((heading, False) for heading in headings))
    most = max(row.p95 for row in rows)
    for row in rows:
        table.add_row(
            row.label,
            figures.milliseconds(row.median, beside=most),
            figures.milliseconds(row.p95, beside=most),
            figures.share(row.share),
            figures.giga(row.flops),
            figures.whole_share(row.utilisation),
            figures.rate(row.images_per_second),
            style="dim" if row.name == UNNAMED else "",
        )
    peak = f"; peak measured: {profile.flops_per_second / 1e12:,.1f} TFLOP/s" if profile.flops_per_second else ""
    table.caption = f"{figures.share(figures.coverage(rows))} of the step has a name{peak}"
    return table


def stages_table(profile: Profile) -> Table | None:
    """Returns the data path's stages and their limits beside what the model could take."""
    if not profile.stages:
        return None
    headings = ("ms an image", "threads", "limit, images/s", "of the model’s")
    table = _table("data path", ("", True), *((heading, False) for heading in headings))
    demand = figures.model_rate(profile)
    stages = figures.stage_figures(profile)
    lowest = min(stage.limit for stage in stages)
    for stage in stages:
        table.add_row(
            stage.name,
            f"{1e3 * stage.seconds_per_image:,.3f}",
            str(stage.threads),
            figures.rate(stage.limit),
            f"{stage.limit / demand:,.2f} ×" if demand and stage.limit < float("inf") else NOTHING,
            style="bold" if stage.limit == lowest else "",
        )
    table.caption = "a stage’s limit: on all ranks, if its threads did nothing else" + (
        f"; the model could take {figures.rate(demand)} images/s" if demand else ""
    )
    return table


def gains_table(profile: Profile) -> Table | None:
    """Returns what removing each cause would give, and whether an experiment says the same."""
    if not profile.gains:
        return None
    table = _table(
        "gains", ("cause", True), ("expected, images/s", False), ("gain", False), ("measured", False), ("knob", True)
    )
    for gain in profile.gains:
        table.add_row(
            gain.cause,
            figures.rate(gain.images_per_second),
            figures.gain_of(profile, gain),
            figures.rate(gain.checked) if gain.checked is not None else NOTHING,
            Text.assemble(gain.knob, (f"\nmeasured: {gain.experiment}" if gain.experiment else "", "dim")),
        )
    return table


def memory_table(profile: Profile) -> Table | None:
    """Returns bytes by owner, the most first, on the device and the host, and where the peak is."""
    if not profile.memory and not profile.host_memory:
        return None
    table = _table("memory", ("rank 0", True), ("", False), ("", False), ("host", True), ("", False))
    held = _by_size(profile.memory)
    total = sum(profile.memory.values())
    left = [(figures.label_of(name), figures.size(kept), figures.share(kept / total)) for name, kept in held if kept]
    right = [(name, figures.size(kept)) for name, kept in _by_size(profile.host_memory)]
    for number in range(max(len(left), len(right))):
        table.add_row(
            *(left[number] if number < len(left) else ("", "", "")),
            *(right[number] if number < len(right) else ("", "")),
        )
    if profile.memory_peak:
        place, most = max(profile.memory_peak.items(), key=lambda item: item[1])
        table.caption = f"most allocated: {figures.size(most)}, in {figures.label_of(place)}"
    return table


def waits_table(profile: Profile) -> Table | None:
    """Returns what makes the host wait for the device, the most often first."""
    if not profile.waits:
        return None
    table = _table("waits for the device", ("place", True), ("call", True), ("times a step", False))
    for wait in profile.waits:
        table.add_row(wait.place, wait.operation, str(wait.count))
    table.caption = "each needs values on the host: a GPU runs dry there"
    return table


def ranks_table(profile: Profile) -> Table | None:
    """Returns how ranks differ in each part, where there are several; names the one that others wait for."""
    if len(profile.ranks) < 2:
        return None
    headings = ("least, ms", "median", "most", "by rank", "most / median")
    table = _table(f"{len(profile.ranks)} ranks", ("", True), *((heading, False) for heading in headings))
    rows = list(rank_rows(profile))
    for name, low, middle, high, rank in rows:
        table.add_row(
            figures.label_of(name),
            *(figures.milliseconds(seconds, beside=rows[0][3]) for seconds in (low, middle, high)),
            str(rank),
            figures.percent_more(middle, high),
        )
    table.caption = straggler_line(profile)
    return table


def rank_rows(profile: Profile) -> Iterator[tuple[str, float, float, float, int]]:
    """Yields a part, its least, median and most seconds over ranks, and the rank of the most; dearest first."""
    names = dict.fromkeys(name for summary in profile.ranks for name in summary.parts)
    by_part = {name: {found.rank: found.parts.get(name, 0.0) for found in profile.ranks} for name in names}
    for name, found in sorted(by_part.items(), key=lambda item: -max(item[1].values())):
        rank = max(found, key=lambda rank: found[rank])
        yield name, min(found.values()), statistics.median(found.values()), found[rank], rank


def straggler_line(profile: Profile) -> str:
    """Returns a sentence on the rank that others wait for."""
    found = figures.straggler(profile)
    if found is None:
        return "no rank is slower than the others beyond noise"
    where = figures.label_of(found.part)
    return f"rank {found.rank} is the straggler: {figures.milliseconds(found.excess)} ms more than others, in {where}"


def _headline(profile: Profile) -> str:
    step = (profile.modes.get(REAL) or next(iter(profile.modes.values()))).step
    return (
        f"{profile.title}: {figures.rate(profile.images_per_second)} images/s, {figures.milliseconds(step)} ms a step "
        f"of {profile.images:,} images, ± {figures.share(profile.noise)}"
    )


def _by_size(owners: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(owners.items(), key=lambda item: -item[1])


def _table(title: str, *columns: Column) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading, is_words in columns:
        table.add_column(heading, justify="left" if is_words else "right", no_wrap=not is_words)
    return table
