"""Times the steps of a recipe; with ``--base COMMIT`` compares losses and step times with that commit.

The two sides alternate, two rounds each, so that a machine that slows down slows both.  Exit code 1 if losses differ.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One checkout."""

    name: str
    """What the report calls it."""
    root: Path
    """Its top folder."""
    losses: list[list[float]] = field(default_factory=list)
    """Of every step, ``round step``."""
    seconds: list[float] = field(default_factory=list)
    """Of every step after warm-up, all rounds."""


def checkout(commit: str, folder: Path) -> Side:
    """Returns a commit's files in ``folder``, without touching git's own state."""
    named = subprocess.run(
        ["git", "rev-parse", "--short", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    folder.mkdir()
    archive = subprocess.run(["git", "archive", named], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    subprocess.run([sys.executable, str(folder / "tools" / "typing_tree.py")], check=True)
    return Side(name=named, root=folder)


def train(side: Side, recipe: Path, out: Path, *, steps: int, warmup: int) -> None:
    """Trains ``steps`` steps from the side's files, with this checkout's data, and adds what it measured."""
    flags = {"out": str(out), "steps": str(steps), "logging.every": "1", "logging.tensorboard": "False"}
    flags |= {"evaluation.every": "0", "evaluation.baselines": "False", "checkpoint.every": "0"}
    command = [sys.executable, str(side.root / "train.py"), str(recipe)]
    command += [word for name, value in flags.items() for word in (f"--{name}", value)]
    environment = os.environ | {"PYTHONPATH": str(side.root / ".typing")}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(f"prove.py: {side.name}: train.py ended with {done.returncode}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["kind"] == "train"]
    side.losses.append([row["loss"] for row in rows])
    side.seconds.extend(row["period_seconds"] for row in rows[warmup:])


def times(side: Side) -> str:
    """Returns median and 95th percentile of a side's step time, as a line."""
    ordered = sorted(side.seconds)
    late = ordered[math.ceil(0.95 * len(ordered)) - 1]
    median = statistics.median(ordered)
    return f"{side.name:12} {1000 * median:9.1f} ms median {1000 * late:9.1f} ms p95   ({len(ordered)} steps)"


def difference(first: list[float], second: list[float]) -> str:
    """Returns where two rows of losses part and how far they get, empty if they are equal to the last bit."""
    unequal = [step for step, pair in enumerate(zip(first, second, strict=True), start=1) if pair[0] != pair[1]]
    if not unequal:
        return ""
    largest = max(abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in zip(first, second, strict=True))
    at = unequal[0]
    return f"from step {at} on ({first[at - 1]!r} and {second[at - 1]!r}); at most {largest:.2g} of the value"


def hardware() -> str:
    """Returns what the figures were measured on."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cpu = platform.processor() or platform.machine()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return f"{name}, {cpu}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"


def main() -> int:
    """Returns 0, or 1 if the two commits' losses differ."""
    parser = argparse.ArgumentParser(description="Time a recipe's steps; with --base, compare with a commit.")
    parser.add_argument("recipe", type=Path, help="YAML file in configs/; its data must be there")
    parser.add_argument("--base", default="", help="commit to compare with")
    parser.add_argument("--steps", type=int, default=60, help="steps to train")
    parser.add_argument("--warmup", type=int, default=10, help="first steps that are not timed")
    arguments = parser.parse_args()
    if not 0 <= arguments.warmup < arguments.steps:
        parser.error(f"--warmup is {arguments.warmup}; it must be less than --steps ({arguments.steps})")
    with tempfile.TemporaryDirectory(prefix="prove-") as name:
        folder = Path(name)
        sides = [Side(name="this tree", root=ROOT)]
        if arguments.base:
            sides.insert(0, checkout(arguments.base, folder / "base"))
        for number in range(ROUNDS):
            for at, side in enumerate(sides):
                out = folder / f"run-{number}-{at}"
                train(side, arguments.recipe.resolve(), out, steps=arguments.steps, warmup=arguments.warmup)
    print(f"{arguments.recipe}, {arguments.steps} steps, {ROUNDS} rounds: {hardware()}")
    for side in sides:
        print(times(side))
        if parted := difference(side.losses[0], side.losses[1]):
            print(f"{side.name}: its own two rounds differ {parted}")
    if len(sides) == 1:
        return 0
    parted = difference(sides[0].losses[0], sides[1].losses[0])
    print(f"losses differ {parted}" if parted else f"losses are identical in all {arguments.steps} steps")
    return 1 if parted else 0


if __name__ == "__main__":
    sys.exit(main())
