"""``maestri profile teachers``: what none, one and two teachers cost."""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from maestri.engine import distributed
from maestri.engine.config import RunConfig
from maestri.engine.config_files import load_config
from maestri.engine.distributed import Ranks
from maestri.engine.start import check_slices
from maestri.profiler.teachers import FEWEST_ROUNDS, measure_teachers, num_steps
from maestri.profiler.teachers_cost import TeachersCost
from maestri.profiler.teachers_table import cost_table, machine_line, parts_table
from maestri.profiler.variants import check_method


@dataclass(frozen=True, kw_only=True, slots=True)
class TeachersArguments:
    """Measure what PL-MAE's step costs with no, one and two teachers.

    The recipe's encoder, views, batch and engine, on one batch of noise that stays on the device, so that data play no
    part.  The three take turns.  Without a teacher, the student is trained towards targets that were made once.  The
    recipe's fields are set as for training, by --section.field VALUE.  On several ranks:
    torchrun --standalone --nproc-per-node N -m maestri.profiler.cli teachers CONFIG
    """

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A recipe of PL-MAE; its shards need not be there."""
    steps: int = 10
    """Optimizer steps of each of the three in a round."""
    rounds: int = 6
    """Rounds; shares are medians over them."""
    batch_size: int = 0
    """Images per optimizer step, over all ranks; the recipe's by default."""
    processor_time: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take the processes' own processor time, on a CPU that other programs use meanwhile; waiting for other ranks does
    not count then."""
    json: Path | None = None
    """File for everything that was measured."""


def check(arguments: TeachersArguments) -> None:
    """Raises ValueError where an argument is out of range; tyro would frame it."""
    if arguments.steps < 1:
        raise ValueError(f"--steps is {arguments.steps}; it must be at least 1")
    if arguments.rounds < FEWEST_ROUNDS:
        raise ValueError(f"--rounds is {arguments.rounds}; it must be at least {FEWEST_ROUNDS}")
    if arguments.batch_size < 0:
        raise ValueError(f"--batch-size is {arguments.batch_size}; it must be at least 1 image")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise ValueError(f"--json: there is no folder {arguments.json.parent}")


def configure(argv: Sequence[str]) -> tuple[TeachersArguments, RunConfig, torch.device]:
    """Returns the arguments, the recipe with its flags, and the device, with the process set up for it.

    Raises:
        ValueError: an argument or the recipe is wrong.
    """
    arguments, flags = tyro.cli(
        TeachersArguments, prog="maestri profile teachers", args=argv, return_unknown_args=True, use_underscores=False
    )
    check(arguments)
    config = load_config(arguments.config, flags)
    if arguments.batch_size:
        config = replace(config, batch=replace(config.batch, global_size=arguments.batch_size))
    check_method(config)
    check_slices(config.batch, int(os.environ.get("WORLD_SIZE", "1")))
    device = distributed.prepare_environment(config.engine.device)
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    return arguments, config, device


def run(argv: Sequence[str]) -> None:
    """Measures; rank 0 prints, and writes the file asked for.

    Raises:
        ValueError: an argument or the recipe is wrong.
        RunError: the run failed.
        OSError: the file could not be written.
    """
    arguments, config, device = configure(argv)
    ranks = distributed.start(device, timeout_minutes=config.engine.timeout_minutes, verbose=config.logging.verbose)
    found = _measure(arguments, config, ranks)
    if not ranks.is_main:
        return
    console = Console()
    console.print(cost_table(found))
    console.print(parts_table(found))
    console.print(machine_line(found), highlight=False)
    console.print(found.verdict(), highlight=False)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found.as_json(), indent=2) + "\n", encoding="utf-8")


def _measure(arguments: TeachersArguments, config: RunConfig, ranks: Ranks) -> TeachersCost:
    steps, rounds = arguments.steps, arguments.rounds
    shown = ranks.is_main and sys.stderr.isatty()
    with Progress(transient=True, disable=not shown, console=Console(stderr=True)) as progress:
        task = progress.add_task("steps", total=num_steps(steps=steps, rounds=rounds))
        return measure_teachers(
            config,
            ranks,
            steps=steps,
            rounds=rounds,
            clock=time.process_time if arguments.processor_time else time.perf_counter,
            on_step=lambda: progress.advance(task),
        )
