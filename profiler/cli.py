"""``maestri profile``: where the time of training goes; on several ranks ``torchrun … -m maestri.profiler.cli``."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from maestri.engine.distributed import environment_rank, is_lost_rank, leave, one_line
from maestri.engine.errors import RunError
from maestri.pipelines.ahead import LoaderStuck
from maestri.pipelines.reader import TooManyBadSamples
from maestri.profiler import diff_cli, profile_cli, teachers_cli

EXIT_FAILED = 1
EXIT_USAGE = 2

EXIT_INTERRUPTED = 130

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "teachers": (teachers_cli.run, "what none, one and two teachers cost"),
    "diff": (diff_cli.run, "what changed between two profiles, and whether it is more than noise"),
}


def usage() -> str:
    """Returns the help text."""
    lines = [f"  {name:10}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: maestri profile CONFIG …   (maestri profile CONFIG --help)",
            "       maestri profile COMMAND …  (each has --help)",
            "",
            *lines,
        ]
    )


def run(argv: list[str]) -> int:
    """Runs ``maestri profile`` and returns its exit code: 0, 1 after a failure, 2 after wrong usage."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else EXIT_USAGE
    if argv[0] in COMMANDS:
        name, command, rest = f" {argv[0]}", COMMANDS[argv[0]][0], argv[1:]
    elif Path(argv[0]).suffix in (".yaml", ".yml"):
        name, command, rest = "", profile_cli.run, argv
    else:
        known = ", ".join(COMMANDS)
        print(f"maestri profile: '{argv[0]}' is neither a recipe (.yaml) nor one of: {known}", file=sys.stderr)
        return EXIT_USAGE
    code, orderly = 0, True
    try:
        command(rest)
    except ValueError as error:
        code, orderly = EXIT_USAGE, not _is_shared()
        _complain(name, one_line(error), everywhere=_is_shared())
    except RunError as error:
        code = EXIT_FAILED
        _complain(name, one_line(error))
    except (OSError, TooManyBadSamples, LoaderStuck) as error:
        code, orderly = EXIT_FAILED, not _is_shared()
        _complain(name, one_line(error), everywhere=_is_shared())
    except torch.OutOfMemoryError as error:
        code, orderly = EXIT_FAILED, False
        _complain(name, f"the device has too little memory; lower the batch size ({one_line(error).split('. ')[0]})")
    except KeyboardInterrupt:
        code, orderly = EXIT_INTERRUPTED, False
        _complain(name, "interrupted")
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        code, orderly = EXIT_FAILED, False
        _complain(name, "another rank has ended or hangs; see what it says", everywhere=True)
    if dist.is_initialized():  # gloo aborts some plain exits
        leave(code, orderly=orderly)
    return code


def _is_shared() -> bool:
    """Returns whether other ranks may be somewhere else, with no such error."""
    return dist.is_initialized() and dist.get_world_size() > 1


def _complain(command: str, line: str, *, everywhere: bool = False) -> None:
    rank = environment_rank()
    if everywhere or rank == 0:
        where = f"rank {rank}: " if everywhere else ""
        print(f"maestri profile{command}: {where}{line}", file=sys.stderr)


if __name__ == "__main__":  # torchrun --nproc-per-node N -m maestri.profiler.cli teachers CONFIG
    sys.exit(run(sys.argv[1:]))
