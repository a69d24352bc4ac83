"""Conversion against decoding, each of two processes held to a share of one core.

    python benchmarks/convert_shards_quota.py PHOTOS SCRATCH [--share 22] [--core 1] [--base CHECKOUT] [--workers 1]

For a machine on which others are at work.  Two processes share a core, each in a control group that may use so many
per cent of it; as long as others leave both shares free, they are two slow cores that nobody else uses.  What two real
cores cost each other, in memory above all, does not show.  CHECKOUT is another commit's, after
``tools/typing_tree.py`` was run in it.  All runs of a round follow one another.  Needs root and control groups of
version 1.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convert_shards import copied

GROUPS = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 10_000
SETTLE_SECONDS = 0.003

DECODE = """
import multiprocessing, os, sys, time
from pathlib import Path
files = sorted(Path(sys.argv[1]).rglob("*.jpg"))
def part(number):
    Path(sys.argv[2 + number]).write_text(str(os.getpid()))
    import simplejpeg
    for path in files[number::count]:
        simplejpeg.decode_jpeg(path.read_bytes())
count = len(sys.argv) - 2
processes = [multiprocessing.Process(target=part, args=(number,)) for number in range(count)]
start = time.perf_counter()
for process in processes:
    process.start()
for process in processes:
    process.join()
print(time.perf_counter() - start)
"""


@contextmanager
def slow_cores(count: int, share: int) -> Iterator[list[Path]]:
    """Gives the groups' lists of tasks."""
    groups = [GROUPS / f"convert_shards_{number}" for number in range(count)]
    try:
        for group in groups:
            group.mkdir(exist_ok=True)
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(PERIOD_US * share // 100))
        yield [group / "tasks" for group in groups]
    finally:
        for group in groups:
            while (group / "tasks").read_text():  # what was started last is about to end
                time.sleep(0.1)
            group.rmdir()


def children(process: int) -> list[int]:
    """Returns a process's children, none if it has ended."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")]
    except OSError:
        return []
    return [int(child) for child in " ".join(lists).split()]


def move(process: int, tasks: Path) -> None:
    """Moves all threads of a process into a group."""
    for thread in Path(f"/proc/{process}/task").glob("*"):
        try:
            tasks.write_text(thread.name)
        except OSError:
            continue  # it has just ended


def spread(command: int, cores: list[Path], done: threading.Event) -> None:
    """Moves the process that workers are forked from to the last core, and workers to all in turn."""
    seen: set[int] = set()
    workers = 0
    while not done.wait(SETTLE_SECONDS):
        for child in children(command):
            try:
                is_server = b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:
                continue
            if is_server and child not in seen:
                seen.add(child)
                move(child, cores[-1])
            for worker in children(child) if is_server else []:
                if worker not in seen:
                    seen.add(worker)
                    move(worker, cores[workers % len(cores)])
                    workers += 1


def convert(photos: Path, out: Path, base: Path | None, core: int, cores: list[Path]) -> float:
    """Returns the seconds that ``maestri shards convert`` takes, a worker for each slow core, its start included."""
    shutil.rmtree(out, ignore_errors=True)
    command = [Path(sys.executable).with_name("maestri"), "shards", "convert", photos, out, "--json"]
    command += ["--workers", str(len(cores)), "--no-check-space"]
    environment = {**os.environ, **({"PYTHONPATH": str(base / ".typing")} if base is not None else {})}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env=environment, preexec_fn=lambda: enter(core, cores[0])
    )
    done = threading.Event()
    spreader = threading.Thread(target=spread, args=(process.pid, cores, done))
    spreader.start()
    code = process.wait()
    seconds = time.perf_counter() - start
    done.set()
    spreader.join()
    assert code == 0
    return seconds


def decode_only(photos: Path, core: int, cores: list[Path]) -> float:
    """Returns the seconds of processes, one for each slow core, that read and decode all files."""
    command = [sys.executable, "-c", DECODE, photos, *cores]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, preexec_fn=lambda: enter(core, cores[0]))
    return float(process.stdout)


def enter(core: int, tasks: Path) -> None:
    """Puts this process on a core and into a group."""
    os.sched_setaffinity(0, {core})
    tasks.write_text(str(os.getpid()))


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=int, default=22)
    parser.add_argument("--core", type=int, default=1)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--workers", type=int, default=2, choices=(1, 2))
    options = parser.parse_args()
    scratch: Path = options.scratch / "convert_shards"
    shutil.rmtree(scratch, ignore_errors=True)
    many, out = copied(options.photos, scratch / "many", options.repeat), scratch / "out"
    names = [f"decode only, {options.workers} at work", f"tar, decode, {options.workers} at work"]
    names += ["the same, base"] if options.base is not None else []
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with slow_cores(options.workers, options.share) as cores:
        for number in range(options.rounds):
            for name, values in seconds.items():
                if name == names[0]:
                    values.append(decode_only(many, options.core, cores))
                else:
                    base = options.base if "base" in name else None
                    values.append(convert(many, out, base, options.core, cores))
                print(f"round {number + 1}: {name} {values[-1]:.2f} s", file=sys.stderr)
    print("| what | seconds, each round | ratio of each round | median |\n|---|---|---|---:|")
    for name, values in seconds.items():
        ratios = [first / own for first, own in zip(seconds[names[0]], values, strict=True)]
        cells = [", ".join(f"{value:.1f}" for value in values), ", ".join(f"{ratio:.2f}" for ratio in ratios)]
        print(f"| {name} | {cells[0]} | {cells[1]} | {statistics.median(ratios):.2f} |")
    shutil.rmtree(scratch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
