"""A small training run on images of noise, for proofs: its files, its processes, and what it leaves."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from maestri.engine.checkpoint import latest
from maestri.engine.logs import read_rows
from maestri.shards.convert import ConvertConfig, convert

PROGRAM = Path(__file__).resolve().parent.parent / "train.py"
RECIPE = "small.yaml"
SETTINGS = """
steps: 40
seed: 3
data: {shards: shards, num_threads: 1}
views: {size: 32}
encoder: {patch: 8, dim: 32, heads: 2, depth: 2, drop_path: 0.2}
batch: {global_size: 8}
method:
  plmae:
    decoder: {dim: 24, depth: 1, heads: 2}
    class_level: {head: {hidden: 32, layers: 2, bottleneck: 16, prototypes: 16}}
    data_level: {head: {hidden: 32, layers: 2, bottleneck: 16, prototypes: 16}}
    reconstruction: {codes: 16, head: {hidden: 32, layers: 2, bottleneck: 16, prototypes: 16}}
engine: {device: cpu, precision: fp32, threads: 1, zero_stage: 2}
checkpoint: {every: 4, keep: 2}
logging: {every: 1, tensorboard: false}
"""
MARK = "MAESTRI_PROOF"
"""An environment variable by which all that a command has started is found."""
CLOCKS = (
    "seconds/",
    "data_wait",
    "images_per_second",
    "period_seconds",
    "elapsed_seconds",
    "utilisation",
    "host_bytes",
)
"""Fields of a row that are times, or of the machine."""
PATIENCE = 240.0
"""Seconds after which a run is taken for stuck."""


def write_inputs(folder: Path) -> None:
    """Writes shards of noise and a recipe that trains on them."""
    write_shards(folder)
    (folder / RECIPE).write_text(SETTINGS, encoding="utf-8")


def write_shards(folder: Path, *, images: int = 64) -> None:
    """Writes small images of noise, in four classes, and packs them into ``shards``."""
    generator = np.random.default_rng(0)
    for index in range(images):
        path = folder / "images" / f"class_{index % 4}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    convert(folder / "images", folder / "shards", ConvertConfig(workers=1))


# ------------------------------------------------------------------------------------------------------- processes


def on_ranks(ranks: int, *flags: str, restarts: int = 0) -> list[str]:
    """Returns the command of a run on this machine; torchrun starts its ranks again up to ``restarts`` times."""
    options = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    return [sys.executable, "-m", "torch.distributed.run", *options, str(PROGRAM), RECIPE, *flags]


def is_program(word: str) -> bool:
    """Returns whether a word of a command line names train.py."""
    return Path(word).name == PROGRAM.name


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """A command with all the processes that it started."""

    process: subprocess.Popen[bytes]
    """The command itself."""
    mark: bytes
    """What the environment of each of them holds."""

    def members(self) -> dict[int, list[str]]:
        """Returns the command lines of the processes that live, by their ids."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark in (path / "environ").read_bytes().split(b"\0"):
                    found[int(path.name)] = (path / "cmdline").read_text(encoding="utf-8").split("\0")
            except OSError:
                continue  # it ended meanwhile
        return found

    def ranks(self) -> list[int]:
        """Returns the ids of the training processes."""
        return [number for number, words in self.members().items() if any(map(is_program, words[1:3]))]

    def kill(self) -> None:
        """Ends all of them by SIGKILL; torchrun gives each rank a session of its own, so no group holds them all."""
        while members := self.members():
            for number in members:
                try:
                    os.kill(number, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.01)
        self.process.wait()

    def wait(self, patience: float = PATIENCE) -> int | None:
        """Returns the exit code, None if that took too long; then everything is killed."""
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
            return None


def started(command: list[str], folder: Path, *, output: Path | None = None, **variables: str) -> Started:
    """Starts a command in ``folder``, with more environment ``variables``; ``output`` takes its stdout and stderr."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launchers}
    mark = uuid.uuid4().hex
    environment |= {"OMP_NUM_THREADS": "1", MARK: mark, **variables}
    with Path(output or os.devnull).open("wb") as sink:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, start_new_session=True, stdout=sink, stderr=subprocess.STDOUT
        )
    return Started(process=process, mark=f"{MARK}={mark}".encode())


def wait_until(condition: Callable[[], bool], run: Started, patience: float = PATIENCE) -> bool:
    """Returns whether ``condition`` came true while the command ran."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and run.process.poll() is None:
        if condition():
            return True
        time.sleep(0.002)
    return False


# --------------------------------------------------------------------------------------------------- what a run leaves


def last_step(out: Path) -> int:
    """Returns the number of optimizer steps in a run's rows."""
    return max((int(row["step"]) for row in read_rows(out / "metrics.jsonl")), default=0)


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Returns a run's rows without times."""
    rows = read_rows(out / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(CLOCKS)} for row in rows]


def tensors_of(out: Path) -> dict[str, Tensor]:
    """Returns all tensors of a run's last checkpoint: student, teachers, moments, and the method's state."""
    checkpoint = latest(out)
    found = {}
    for path in sorted(checkpoint.rglob("*.safetensors")) if checkpoint else []:
        for name, value in load_file(path).items():
            found[f"{path.relative_to(out)}:{name}"] = value
    return found


def difference(out: Path, expected: Path) -> str:
    """Returns where a complete run differs from another one, to the last bit; empty if nowhere."""
    rows, expected_rows = rows_of(out), rows_of(expected)
    if rows != expected_rows:
        unequal = [row["step"] for row, other in zip(rows, expected_rows, strict=False) if row != other]
        return f"{len(rows)} rows, not {len(expected_rows)}" if not unequal else f"rows differ from step {unequal[0]}"
    tensors, expected_tensors = tensors_of(out), tensors_of(expected)
    if tensors.keys() != expected_tensors.keys() or not tensors:
        return f"the last checkpoint has other tensors: {sorted(tensors.keys() ^ expected_tensors.keys())[:3]}"
    unequal = [name for name, value in tensors.items() if not torch.equal(value, expected_tensors[name])]
    return f"{len(unequal)} of {len(tensors)} tensors differ, the first is {unequal[0]}" if unequal else ""
