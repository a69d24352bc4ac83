"""A memory plan as a table for people."""

from collections.abc import Iterator

from rich.table import Table

from maestri.profiler.plan import MemoryPlan

_NOTHING = "–"


def plan_table(plan: MemoryPlan) -> Table:
    """Returns GiB of a rank by owner, a column for each ZeRO stage."""
    table = Table("GiB on each rank", title=f"{plan.title}: {plan.images:,} images a rank")
    for stage in plan.stages:
        table.add_column(f"ZeRO {stage.stage}", justify="right")
    for label, *cells in _memory_rows(plan):
        table.add_row(label, *cells)
    table.add_section()
    table.add_row("all", *(_gib(stage.total) for stage in plan.stages), style="bold")
    fits = ("fits" if stage.total <= plan.limit else "too much" for stage in plan.stages)
    table.add_row(f"in {plan.limit / 2**30:g} GiB", *fits)
    table.add_row("largest batch, images a rank", *(f"{stage.largest_batch:,}" for stage in plan.stages))
    if any(stage.host for stage in plan.stages):
        table.add_row("on the host: what is offloaded", *(_gib(sum(stage.host.values())) for stage in plan.stages))
    return table


def allowance_line(plan: MemoryPlan) -> str:
    """Returns what is assumed, and what the figures are."""
    assumed = plan.allowance
    return (
        f"Worked out from shapes. Assumed: {assumed.context_bytes / 2**30:g} GiB for the device's context and "
        f"libraries (--context-gib), {assumed.fragmentation:.0%} of the step for fragmentation (--fragmentation)."
    )


def _memory_rows(plan: MemoryPlan) -> Iterator[tuple[str, ...]]:
    for owner in dict.fromkeys(owner for stage in plan.stages for owner in stage.kept):
        yield owner.replace("_", " "), *(_gib(stage.kept.get(owner, 0)) for stage in plan.stages)
    yield "bucket to reduce gradients in", *(_gib(stage.bucket) for stage in plan.stages)
    yield "batch, and those made ahead", *(_gib(stage.batches) for stage in plan.stages)
    yield "a step at its most", *(_gib(stage.step) for stage in plan.stages)
    yield "  activations kept for backward", *(_gib(stage.activations) for stage in plan.stages)
    yield "  gradients before the update", *(_gib(stage.gradients) for stage in plan.stages)
    if any(stage.gathered for stage in plan.stages):
        yield "  gathered parameters", *(_gib(stage.gathered) for stage in plan.stages)
    yield "assumed", *(_gib(stage.allowance) for stage in plan.stages)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f}" if num_bytes else _NOTHING
