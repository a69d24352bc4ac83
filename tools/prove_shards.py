"""Long proofs about shards: kills at any moment, and damage of every kind.

    python tools/prove_shards.py [--kills 20] [--mutations 10000] [--seed 0]

Kills: a conversion into both formats, with images among them that cannot be read, is killed (SIGKILL, the whole group)
at random moments and run again, over and over; in the end every byte must be that of an undisturbed one.  The same for
one in two parts, killed and run again in turn, and then merged, which is killed, too.  Mutations: so
many damaged JPEGs, tars, betons, and manifests and indexes; each must be refused in one line or taken for what it is.
The suite runs short forms of all of this.  Exit code 1 if anything went wrong.
"""

import argparse
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "shards"
SHARDS = (str(Path(sys.executable).with_name("maestri")), "shards")
CONVERT = (*SHARDS, "convert")
PARTS = ("1/2", "2/2")
NUM_IMAGES = 400
PATIENCE = 120.0


def load(name: str) -> ModuleType:
    """Returns a module of the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_source(folder: Path) -> None:
    """Writes images that take some milliseconds each, every fortieth of them unreadable."""
    ramp = np.add.outer(np.arange(500), np.arange(700)).astype(np.uint8)
    for number in range(NUM_IMAGES):
        path = folder / f"class_{number % 4}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(ramp, 7 * number, 1)).save(path, compress_level=1)
        if number % 40 == 0:
            path.write_bytes(path.read_bytes()[:1000])


def contents(folder: Path) -> dict[str, bytes]:
    """Returns every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(source: Path, out: Path, workers: int, *more: str) -> subprocess.Popen[bytes]:
    """Starts a conversion in a session of its own."""
    settings = ("--format", "both", "--workers", str(workers), "--shard-samples", "16", *more)
    return started(*CONVERT, str(source), str(out), *settings)


def started(*command: str) -> subprocess.Popen[bytes]:
    """Starts a command in a session of its own."""
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def ended(process: subprocess.Popen[bytes], patience: float) -> int | None:
    """Returns a process's exit code, None if it took too long and was killed, with all that it had started."""
    try:
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def kills(folder: Path, count: int, dice: random.Random) -> Iterable[str]:
    """Yields what is wrong after so many kills."""
    source = folder / "source"
    write_source(source)
    began = time.monotonic()
    if start(source, folder / "undisturbed", 1).wait(PATIENCE):
        yield "the undisturbed conversion failed"
        return
    whole = time.monotonic() - began
    expected = contents(folder / "undisturbed")
    done = rounds = 0
    out = folder / "killed"
    while done < count:
        rounds += 1
        code = ended(start(source, out, 2), dice.uniform(0.05, 1.0) * whole)
        if code is None:
            done += 1
            continue
        if code:
            yield f"run {rounds} ended with {code} after {done} kills"
            return
        if contents(out) != expected:
            yield f"run {rounds}, after {done} kills: bytes differ from the undisturbed conversion"
            return
        shutil.rmtree(out)
    if start(source, out, 2).wait(PATIENCE) or contents(out) != expected:
        yield f"the last run, after {done} kills: it failed, or bytes differ from the undisturbed conversion"
    print(f"  {done} kills in {rounds} runs; one undisturbed run takes {whole:.1f} s")


def kills_in_parts(folder: Path, count: int, dice: random.Random) -> Iterable[str]:
    """Yields what is wrong after so many kills of parts in turn, and of merging them; ``kills`` comes before."""
    source, out = folder / "source", folder / "parts"
    expected = contents(folder / "undisturbed")
    began = time.monotonic()
    for part in PARTS:
        if start(source, folder / "undisturbed parts", 1, "--part", part).wait(PATIENCE):
            yield f"the undisturbed part {part} failed"
            return
    whole = time.monotonic() - began
    merging = (*SHARDS, "merge", str(out))
    began = time.monotonic()
    if started(*SHARDS, "merge", str(folder / "undisturbed parts")).wait(PATIENCE):
        yield "the undisturbed merging failed"
        return
    merge_seconds = time.monotonic() - began
    done = {"convert": 0, "merge": 0}
    while sum(done.values()) < count:
        waiting = list(PARTS)
        while waiting:  # each part for a while, in turn
            part = waiting.pop(0)
            code = ended(start(source, out, 1, "--part", part), dice.uniform(0.3, 1.2) * whole / len(PARTS))
            if code is None:
                done["convert"] += 1
                waiting.append(part)
            elif code:
                yield f"part {part} ended with {code} after {done} kills"
                return
        for _ in range(3):
            code = ended(started(*merging), dice.uniform(0.5, 1.1) * merge_seconds)
            done["merge"] += code is None
            if code:
                yield f"merging ended with {code} after {done} kills"
                return
        if started(*merging).wait(PATIENCE) or contents(out) != expected:
            yield f"merging failed after {done} kills, or bytes differ from the undisturbed conversion"
            return
        shutil.rmtree(out)
    print(f"  {done['convert']} kills of parts and {done['merge']} of merging, which takes {merge_seconds:.1f} s")


def mutated_tars(count: int) -> Iterable[str]:
    """Yields what is wrong with how damaged tars are taken."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(TESTS / "test_mutated_tars.py")]
    environment = os.environ | {"MUTATIONS": str(count)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        yield done.stdout[-2000:]


def mutated_sets(folder: Path, count: int, seed: int) -> Iterable[str]:
    """Yields what is wrong with how damaged manifests and indexes are taken."""
    source, out = folder / "few", folder / "set"
    for number in range(60):
        path = source / f"class_{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20 + number, 30), number).save(path)
    subprocess.run([*CONVERT, str(source), str(out), "--shard-samples", "20"], check=True, capture_output=True)
    yield from load("set_mutations").problems(out, count, seed)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    count, seed = options.mutations, options.seed
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        proofs: dict[str, Callable[[], Iterable[str]]] = {
            f"{options.kills} kills": lambda: kills(folder, options.kills, random.Random(seed)),
            f"{options.kills} kills of parts": lambda: kills_in_parts(folder, options.kills, random.Random(seed)),
            f"{count} damaged JPEGs": lambda: load("jpeg_mutations").problems(count, seed),
            f"{count} damaged betons": lambda: load("beton_mutations").problems(folder, count, seed),
            f"{count} damaged manifests and indexes": lambda: mutated_sets(folder, count, seed),
            f"{count} damaged tars": lambda: mutated_tars(count),
        }
        for what, proof in proofs.items():
            began = time.monotonic()
            problems = list(proof())
            print(f"{what}: {len(problems)} problems, {time.monotonic() - began:.0f} s", flush=True)
            for problem in problems[:10]:
                print(f"  {problem}", file=sys.stderr)
            failed |= bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
