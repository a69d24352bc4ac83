"""``maestri shards``: its commands, and what a user sees when something is wrong."""

import contextlib
import functools
import io
import itertools
import logging
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import tyro

from maestri.shards.commands.convert import convert
from maestri.shards.commands.index import index
from maestri.shards.commands.inspect import inspect
from maestri.shards.commands.merge import merge
from maestri.shards.commands.repack import repack
from maestri.shards.commands.sample import sample
from maestri.shards.commands.stats import stats
from maestri.shards.commands.verify import verify
from maestri.shards.errors import ShardError

COMMANDS: tuple[Callable[..., int], ...] = (convert, index, verify, merge, repack, stats, sample, inspect)
DESCRIPTION = "Turn data sets into shards, check them, and look at them."
USAGE_ERROR = 2
_DIVIDER = re.compile("[╰─]{2}|-{3,}$")


def run(argv: list[str]) -> int:
    """Runs ``maestri shards`` and returns its exit code: 0, 1 after an error or damage, 2 after wrong usage."""
    logging.basicConfig(format="maestri shards: %(message)s", stream=sys.stderr)
    app = tyro.extras.SubcommandApp()
    for command in COMMANDS:
        name, doc = command.__name__, command.__doc__ or ""
        brief = None if argv[:1] == [name] else doc.splitlines()[0]  # in the list of all commands
        app.command(name=name, help=brief)(_caught(command))
    try:
        with _usage_errors(argv):
            outcome = app.cli(prog="maestri shards", description=DESCRIPTION, args=argv, use_underscores=False)
        return int(outcome())
    except SystemExit as stop:
        return int(stop.code or 0) if not isinstance(stop.code, str) else USAGE_ERROR
    except (ShardError, OSError) as error:
        print(f"maestri shards: {error}", file=sys.stderr)
        return 1


def _caught(command: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """Returns a function that takes the same arguments and does nothing with them yet."""

    @functools.wraps(command)
    def caught(*args: Any, **kwargs: Any) -> Callable[[], int]:
        return functools.partial(command, *args, **kwargs)

    return caught


@contextlib.contextmanager
def _usage_errors(argv: list[str]) -> Iterator[None]:
    """Makes one line of what tyro prints in a box when it does not understand."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as stop:
        if stop.code not in (None, 0):
            names = [command.__name__ for command in COMMANDS]
            command = f" {argv[0]}" if argv and argv[0] in names else ""
            print(f"maestri shards{command}: {_one_line(printed.getvalue(), command)}", file=sys.stderr)
        raise
    print(printed.getvalue(), end="", file=sys.stderr)


def _one_line(boxed: str, command: str) -> str:
    """Returns the first paragraph of a box, what tyro thinks was meant, and where to read on."""
    rows = [line.strip("│| ") for line in boxed.splitlines()[1:]]  # without the title; not always is there a box
    lines = list(itertools.dropwhile(_DIVIDER.match, filter(None, rows)))
    divider = next((at for at, line in enumerate(lines) if _DIVIDER.match(line)), len(lines))
    text = " ".join(" ".join(lines[:divider]).split()) or "wrong usage"
    text = re.split(r" Arguments are applied to the directly preceding", text)[0].rstrip(". ")
    text = text.removeprefix(f"Missing from maestri shards{command}: ")
    for at, line in enumerate(lines[:-1]):
        if line.startswith("Perhaps you meant"):
            text += f"; perhaps you meant {lines[at + 1].split()[0]}"
    return f"{text}; see maestri shards{command} --help"
