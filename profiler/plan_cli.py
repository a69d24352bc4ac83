"""``maestri plan``: how much memory a run will need, and what fits, before any device is booked."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from maestri.engine.config import RunConfig
from maestri.engine.config_files import load_config
from maestri.engine.distributed import one_line, quiet_libraries
from maestri.profiler.plan import STAGES, Allowance, make_plan
from maestri.profiler.plan_step import plans_for_cpu
from maestri.profiler.plan_table import allowance_line, plan_table

EXIT_FAILED = 1
EXIT_USAGE = 2
CONTEXT_GIB = 1.5
FRAGMENTATION = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanArguments:
    """Say how much memory a recipe will need on each rank, by owner, and the largest batch that fits.

    Nothing is trained and no GPU is needed: the step is run for its shapes alone.  It is planned for GPUs, with fused
    attention, unless --engine.device is cpu.  The recipe's fields are set as for training, by --section.field VALUE.
    """

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A recipe; its shards need not be there."""
    gpus: int = 8
    """Ranks."""
    zero: tuple[int, ...] = ()
    """ZeRO stages, of 0, 1, 2 and 3; by default all that the recipe can have."""
    batch: int = 0
    """Images per optimizer step, over all ranks; the recipe's by default."""
    memory_gib: float = 80.0
    """Memory of a device, GiB."""
    context_gib: float | None = None
    """Assumed for a device's context, libraries' workspaces and NCCL, GiB; 1.5 by default, 0 on a CPU."""
    fragmentation: float | None = None
    """Assumed for the allocator's fragmentation, a fraction of what a step allocates; 0.05 by default, 0 on a CPU."""
    json: Path | None = None
    """File for all figures, bytes, and for FLOPs per image by part."""


def check(arguments: PlanArguments) -> None:
    """Raises ValueError where an argument is out of range; tyro would frame it."""
    if arguments.gpus < 1:
        raise ValueError(f"--gpus is {arguments.gpus}; it must be at least 1")
    if arguments.batch < 0:
        raise ValueError(f"--batch is {arguments.batch}; it must be at least 1 image")
    for stage in arguments.zero:
        if stage not in STAGES:
            raise ValueError(f"--zero is {stage}; there are the stages 0, 1, 2 and 3")
    if arguments.memory_gib <= 0:
        raise ValueError(f"--memory-gib is {arguments.memory_gib:g}; it must be above 0")
    for name, value in (("context-gib", arguments.context_gib), ("fragmentation", arguments.fragmentation)):
        if value is not None and value < 0:
            raise ValueError(f"--{name} is {value:g}; it must be at least 0")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise ValueError(f"--json: there is no folder {arguments.json.parent}")


def configure(argv: Sequence[str]) -> tuple[PlanArguments, RunConfig]:
    """Returns the arguments, and the recipe with its flags.

    Raises:
        ValueError: an argument or the recipe is wrong.
    """
    arguments, flags = tyro.cli(
        PlanArguments, prog="maestri plan", args=argv, return_unknown_args=True, use_underscores=False
    )
    check(arguments)
    config = load_config(arguments.config, flags)
    if arguments.batch:
        config = replace(config, batch=replace(config.batch, global_size=arguments.batch))
    return arguments, config


def allowance_of(arguments: PlanArguments, *, on_gpu: bool) -> Allowance:
    """Returns what is assumed: what was given, else next to nothing of a CPU."""
    context = CONTEXT_GIB * on_gpu if arguments.context_gib is None else arguments.context_gib
    fragmentation = FRAGMENTATION * on_gpu if arguments.fragmentation is None else arguments.fragmentation
    return Allowance(context_bytes=round(context * 2**30), fragmentation=fragmentation)


def run(argv: list[str]) -> int:
    """Runs ``maestri plan`` and returns its exit code: 0, 1 where a file could not be written, 2 after wrong usage."""
    try:
        arguments, config = configure(argv)
        quiet_libraries()
        offloads = config.engine.offload == "optimizer"
        plan = make_plan(
            config,
            world_size=arguments.gpus,
            stages=arguments.zero or STAGES[offloads:],
            limit=round(arguments.memory_gib * 2**30),
            allowance=allowance_of(arguments, on_gpu=not plans_for_cpu(config)),
        )
        console = Console()
        console.print(plan_table(plan))
        console.print(allowance_line(plan), highlight=False)
        console.print(plan.verdict(), highlight=False)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(plan.as_json(), indent=1) + "\n", encoding="utf-8")
    except ValueError as error:
        print(f"maestri plan: {one_line(error)}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"maestri plan: {one_line(error)}", file=sys.stderr)
        return EXIT_FAILED
    return 0
