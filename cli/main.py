"""The ``maestri`` command: finds the room that a subcommand lives in, and imports nothing else."""

import importlib
import os
import sys
from importlib import metadata

COMMANDS = {
    "shards": ("maestri.shards.cli", "convert, inspect and verify data sets"),
    "pipelines": ("maestri.pipelines.cli", "look at the views and masks a model sees"),
    "eval": ("maestri.evals.cli", "judge what was learnt: k-NN, linear, low-shot, clusters"),
    "profile": ("maestri.profiler.cli", "where time and memory of training go, and why"),
    "study": ("maestri.study.cli", "methods side by side: equal images, equal minutes, one report"),
    "plan": ("maestri.profiler.plan_cli", "memory that a run will need, and what fits, before it is run"),
    "export": ("maestri.engine.export", "write a trained encoder for timm"),
}
USAGE_ERROR = 2


def usage() -> str:
    """Returns the help text."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: maestri COMMAND …  (each has --help)", "", *lines, "", "To train: python train.py CONFIG"]
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else USAGE_ERROR
    if arguments[0] == "--version":
        print(metadata.version("maestri"))
        return 0
    if arguments[0] not in COMMANDS:
        print(f"maestri: unknown command '{arguments[0]}'; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return USAGE_ERROR
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    module = importlib.import_module(COMMANDS[arguments[0]][0])
    try:
        return int(module.run(arguments[1:]))
    except KeyboardInterrupt:
        print("maestri: interrupted", file=sys.stderr)
        return 130
