"""What teachers cost, as tables for people."""

from collections.abc import Iterator

from rich.table import Table

from maestri.profiler.teachers_cost import TeachersCost

_NOTHING = "–"


def cost_table(found: TeachersCost) -> Table:
    """Returns time, FLOPs and memory, a column for each number of teachers."""
    ranks = f"{found.world_size} × {found.device}, {found.precision}"
    table = Table("", title=f"teachers: {found.images} images a step, {ranks}")
    for name in found.variants:
        table.add_column(name, justify="right")
    for label, *cells in (*_time_rows(found), *_memory_rows(found)):
        table.add_row(label, *cells)
    return table


def parts_table(found: TeachersCost) -> Table:
    """Returns FLOPs of a step by part, 10⁹, a column for each number of teachers."""
    table = Table("", title="FLOPs of a step, 10⁹ (a multiplication with its addition is 2)")
    for name in found.variants:
        table.add_column(name, justify="right")
    parts = dict.fromkeys(part for name in ("two", "one", "none") for part in found.variants[name].flops)
    for part in parts:
        counts = [cost.flops.get(part, 0) for cost in found.variants.values()]
        label = "targets from the teachers' outputs" if part == "teachers" else part.replace("_", " ")
        table.add_row(label, *(f"{count / 1e9:,.1f}" if count else _NOTHING for count in counts))
    return table


def machine_line(found: TeachersCost) -> str:
    """Returns the limits that were measured."""
    return (
        f"one rank's limits, measured: {found.peak.flops_per_second / 1e12:,.3f} · 10¹² FLOPs/s ({found.precision}), "
        f"{found.peak.bytes_per_second / 1e9:,.1f} GB/s"
    )


def _time_rows(found: TeachersCost) -> Iterator[tuple[str, ...]]:
    costs = list(found.variants.values())
    limit = found.peak.flops_per_second * found.world_size
    yield "step, ms (median)", *(f"{1e3 * cost.step_seconds:,.1f}" for cost in costs)
    yield "step, ms (p95)", *(f"{1e3 * cost.p95_seconds:,.1f}" for cost in costs)
    yield "images/s", *(f"{found.images / cost.step_seconds:,.1f}" for cost in costs)
    yield "FLOPs a step, 10⁹", *(f"{cost.total_flops / 1e9:,.1f}" for cost in costs)
    yield "  of the teachers", *(_or_nothing(cost.teachers_flops / 1e9, "{:,.1f}") for cost in costs)
    yield "FLOPs/s, of the limit", *(f"{cost.total_flops / cost.step_seconds / limit:.0%}" for cost in costs)
    yield "averages, ms a step", *(_or_nothing(1e3 * cost.averages_seconds, "{:,.2f}") for cost in costs)
    yield "  of the step", *(_or_nothing(cost.averages_share, "{:.2%}") for cost in costs)


def _memory_rows(found: TeachersCost) -> Iterator[tuple[str, ...]]:
    costs = list(found.variants.values())
    owners = {
        "student: parameters, MB": ("parameters",),
        "student: masters, moments, MB": ("masters", "moments"),
        "teachers: modules, MB": ("module of ",),
        "teachers: averages, MB": ("average of ",),
    }
    for label, starts in owners.items():
        sums = [sum(kept for owner, kept in cost.bytes.items() if owner.startswith(starts)) for cost in costs]
        yield label, *(_or_nothing(kept / 1e6, "{:,.1f}") for kept in sums)
    if any(cost.peak_bytes for cost in costs):
        yield "most allocated, MB", *(f"{cost.peak_bytes / 1e6:,.0f}" for cost in costs)
    else:
        yield "most resident, all three, MB", "", "", f"{found.resident_bytes / 1e6:,.0f}"


def _or_nothing(value: float, form: str) -> str:
    return form.format(value) if value else _NOTHING
