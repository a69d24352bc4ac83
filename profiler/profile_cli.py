"""``maestri profile CONFIG``: where the time and memory of training go, why, and what to do about it."""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
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
from maestri.profiler.findings import Profile
from maestri.profiler.measure import Collected, Plan, measure_profile, new_collection
from maestri.profiler.page import write_page
from maestri.profiler.terminal import report
from maestri.profiler.trace import write_trace

FEWEST_STEPS = 2
FEWEST_ROUNDS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileArguments:
    """Measure a recipe's real training step on its real shards, part by part, and say what holds it up.

    Modes take turns, so that what disturbs the machine disturbs all: training as it is, one batch that stays on the
    device, shards in the page cache and out of it, and the resident batch beside a working loader.  Nothing is left of
    the training itself.  The recipe's fields are set as for training, by --section.field VALUE.  On several ranks:
    torchrun --standalone --nproc-per-node N -m maestri.profiler.cli CONFIG
    """

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A recipe."""
    into: Path | None = None
    """Folder for profile.json, profile.html and trace.json; by default only the terminal is written to."""
    steps: int = 8
    """Optimizer steps of each mode in a round."""
    rounds: int = 5
    """Rounds; figures are medians over them."""
    cold: bool = True
    """Drop the shards from the page cache for a mode of its own; other jobs that read them will notice."""
    experiments: bool = True
    """Try what would be gained, where that can be tried."""


def check(arguments: ProfileArguments) -> None:
    """Raises ValueError where an argument is out of range; tyro would frame it."""
    for name, value, least in (("steps", arguments.steps, FEWEST_STEPS), ("rounds", arguments.rounds, FEWEST_ROUNDS)):
        if value < least:
            raise ValueError(f"--{name} is {value}; fewer than {least} say nothing")


def run(argv: Sequence[str]) -> None:
    """Measures; rank 0 shows it, and writes the files asked for, also of what was measured before an interruption.

    Raises:
        ValueError: an argument or the recipe is wrong.
        RunError: the run failed.
        OSError: shards could not be read, or a file not written.
    """
    arguments, flags = tyro.cli(
        ProfileArguments, prog="maestri profile", args=argv, return_unknown_args=True, use_underscores=False
    )
    check(arguments)
    config = load_config(arguments.config, flags)
    check_slices(config.batch, int(os.environ.get("WORLD_SIZE", "1")))
    device = distributed.prepare_environment(config.engine.device)
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    ranks = distributed.start(device, timeout_minutes=config.engine.timeout_minutes, verbose=config.logging.verbose)
    found = new_collection(config, ranks, recipe=arguments.config.stem)
    try:
        measured(arguments, config, ranks, found)
    except (KeyboardInterrupt, torch.OutOfMemoryError):
        if found.modes:
            leave_profile(found.profile(complete=False), arguments.into, ranks)
        raise
    leave_profile(found.profile(complete=True), arguments.into, ranks)


def measured(arguments: ProfileArguments, config: RunConfig, ranks: Ranks, found: Collected) -> None:
    """Fills ``found``, with a bar that shows how far it is."""
    plan = Plan(steps=arguments.steps, rounds=arguments.rounds, cold=arguments.cold, experiments=arguments.experiments)
    shows = ranks.is_main and sys.stderr.isatty()
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(transient=True, disable=not shows, console=Console(stderr=True)) as progress,
    ):
        task = progress.add_task("steps", total=plan.num_steps)
        measure_profile(config, ranks, plan, found, folder=Path(folder), on_step=lambda: progress.advance(task))


def leave_profile(profile: Profile, into: Path | None, ranks: Ranks) -> None:
    """Shows a profile, and writes its files."""
    if not ranks.is_main:
        return
    Console().print(report(profile))
    if into is None:
        return
    into.mkdir(parents=True, exist_ok=True)
    text = json.dumps(profile.as_json(), indent=1, ensure_ascii=False) + "\n"
    (into / "profile.json").write_text(text, encoding="utf-8")
    write_page(profile, into / "profile.html")
    write_trace(profile, into / "trace.json")
