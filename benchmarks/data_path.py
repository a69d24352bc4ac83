"""The data path beside its peers, the loader alone, on CPU: ``python benchmarks/data_path.py PHOTOS SCRATCH``.

PHOTOS is a folder as ``tools/write_photos.py`` writes it; SCRATCH gets our shards of it, once, and is on a disk, as a
cold cache is measured, too.  Peers and what they do differently are in ``data_path_peers.py``.  SPDL is not installed
with the tests' libraries: ``--python-path FOLDER`` is searched after all else, and its FFmpeg by the dynamic linker.

Each measurement is a process of its own.  A short run first finds how many threads or workers suit each peer; then
all measurements of a round follow one another, and medians over rounds are printed as a page.  Decoding alone, bytes in
memory, is timed just before and just after each measurement, so that what disturbs the machine disturbs both.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from convert_shards import members, proportional_size
from data_path_job import WORKLOADS
from data_path_page import page
from data_path_peers import OURS, PEERS
from data_path_run import MARK

ROUNDS = 3
WARM_UP = 6
"""Batches that aren't counted.  This and the batches counted are multiples of 1, 2 and 3 workers, each of which may
make whole batches, so that both ends of the time fall on the same place of their cycle."""
LIMIT_IMAGES = 512
"""Images decoded alone, before and after each measurement."""
MEMORY_SAMPLES = 8
PACKAGES = (
    "torch", "torchvision", "pillow", "numpy", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "spdl-io", "ffcv", "numba",
    "webdataset", "simplejpeg",
)  # fmt: skip


class Failed(Exception):
    """A peer didn't come to an end, or did something else than the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is measured in a round."""

    peer: str
    """Key of ``PEERS``."""
    workload: str
    """Key of ``WORKLOADS``."""
    interpolation: str = "linear"
    """Of the resize."""
    cold: bool = False
    """Whether shards are on the disk alone."""


@dataclass(kw_only=True, slots=True)
class Found:
    """What was measured of a task."""

    workers: int
    """Threads or workers that suited it."""
    results: list[dict[str, Any]] = field(default_factory=list)
    """By round."""
    failure: str = ""
    """Why there is no more."""

    def median(self, name: str) -> float:
        """Returns the median over rounds."""
        return float(statistics.median(result[name] for result in self.results))


class Bench:
    """Measures tasks in processes of their own."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Converts the photos, where that isn't done, and reads what is decoded alone."""
        scratch = options.scratch / "data_path"
        self.photos: Path = options.photos
        self.files = sorted(self.photos.rglob("*.jpg"))
        self.folders = {"tars": scratch / "tar", "beton": scratch / "beton"}
        # webdataset gives each worker tars of its own; ffcv opens one file.
        shard_samples = {"tars": -(-len(self.files) // 6), "beton": len(self.files)}
        for name, folder in self.folders.items():
            command = [Path(sys.executable).with_name("maestri"), "shards", "convert", self.photos, folder, "--json"]
            choices = ["--format", folder.name, "--shard-samples", str(shard_samples[name])]
            if not (folder / "manifest.json").exists():
                subprocess.run([*command, *choices], check=True, stdout=subprocess.DEVNULL)
        self.threads: int = options.threads
        self.python_path = [str(path) for path in options.python_path]
        self.time_limit: float = options.time_limit
        self.batches: int = options.batches

    def measure(self, task: Task, workers: int, batches: int) -> dict[str, Any]:
        """Returns a task's result, decoding alone beside it."""
        before, _ = self.decode_alone()
        self.prepare_cache(cold=task.cold)
        result = self.run(task, workers, batches)
        after, cpu_us = self.decode_alone()
        return result | {"limit": (before + after) / 2, "limit_cpu_us": cpu_us}

    def run(self, task: Task, workers: int, batches: int) -> dict[str, Any]:
        """Returns what a process of its own finds, and the most memory that its processes take together."""
        request = {
            "peer": task.peer, "workload": task.workload, "interpolation": task.interpolation, "workers": workers,
            # Cold, all that is read, ahead of time, too, must be less than an epoch.
            "warm_up": 2 if task.cold else WARM_UP, "batches": min(batches, 9) if task.cold else batches,
            "python_path": self.python_path, "photos": str(self.photos),
            **{name: str(folder) for name, folder in self.folders.items()},
        }  # fmt: skip
        # More threads than cores must be allowed before numba is imported.
        environment = os.environ | {"NUMBA_NUM_THREADS": str(max(3, os.cpu_count() or 1)), "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, str(Path(__file__).with_name("data_path_run.py")), json.dumps(request)]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True, env=environment
            )
            timer = threading.Timer(self.time_limit, lambda: end(process))
            timer.start()
            began = time.monotonic()
            try:
                assert process.stdout is not None
                line = next((line for line in process.stdout if line.startswith(MARK)), "")
                if not line:
                    errors.seek(0)
                    last = (errors.read().strip().splitlines() or ["no message"])[-1]
                    late = time.monotonic() - began >= self.time_limit
                    raise Failed(f"nothing within {self.time_limit:.0f} s" if late else last)
                memory = 0.0
                for _ in range(MEMORY_SAMPLES):
                    memory = max(memory, sum(map(proportional_size, members(process.pid))))
                    time.sleep(0.15)
            finally:
                timer.cancel()
                end(process)
        result: dict[str, Any] = json.loads(line.removeprefix(MARK))
        return result | {"memory_mb": memory}

    def decode_alone(self) -> tuple[float, float]:
        """Returns images per second that libjpeg-turbo decodes in threads, and microseconds of a core per image."""
        import torch
        from torchvision.io import ImageReadMode, decode_image

        step = max(1, len(self.files) // LIMIT_IMAGES)
        encoded = [
            torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            for path in self.files[::step][:LIMIT_IMAGES]
        ]

        def decode(part: list[torch.Tensor]) -> None:
            for data in part:
                decode_image(data, ImageReadMode.RGB)

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(decode, [encoded[:8]] * self.threads))
            began, cpu = time.perf_counter(), time.process_time()
            list(pool.map(decode, [encoded[part :: self.threads] for part in range(self.threads)]))
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        return len(encoded) / seconds, cpu / len(encoded) * 1e6

    def prepare_cache(self, *, cold: bool) -> None:
        """Has all photos and shards in the page cache, or no shard."""
        shards = [path for folder in self.folders.values() for path in folder.iterdir() if path.is_file()]
        for path in shards if cold else [*shards, *self.files]:
            if not cold:
                path.read_bytes()
                continue
            with path.open("rb") as file:
                os.fdatasync(file.fileno())  # what isn't written yet would stay
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def tune(bench: Bench, task: Task, most: int) -> Found:
    """Returns the number of workers that suits a task best, with its failure if it has one."""
    speeds: dict[int, float] = {}
    for workers in range(1, most + 1):
        try:
            result = bench.measure(task, workers, WARM_UP)
        except Failed as failure:
            note(f"{task.workload}: {task.peer} with {workers}: {failure}")
            return Found(workers=workers, failure=str(failure))
        # As a share of decoding beside it: these runs are minutes apart.
        speeds[workers] = result["images_per_second"] / result["limit"]
        note(f"{task.workload}: {task.peer} with {workers}: {result['images_per_second']:,.0f} images/s")
    return Found(workers=max(speeds, key=lambda workers: speeds[workers]))


def measure_all(bench: Bench, options: argparse.Namespace) -> dict[Task, Found]:
    """Returns what was found of all tasks."""
    plain = [Task(peer=peer, workload=workload) for workload in WORKLOADS for peer in options.only]
    if options.workers:
        found = {task: Found(workers=options.workers) for task in plain}
    else:
        found = {task: tune(bench, task, options.most_workers) for task in plain}
    if not options.no_extra:
        for peer in (peer for peer in options.only if peer in OURS):
            for workload in WORKLOADS:
                workers = found[Task(peer=peer, workload=workload)].workers
                for extra in ({"interpolation": "cubic"}, {"cold": True}):
                    found[Task(peer=peer, workload=workload, **extra)] = Found(workers=workers)
    for number in range(options.rounds):
        for task, what in found.items():
            if what.failure:
                continue
            try:
                result = bench.measure(task, what.workers, options.batches)
            except Failed as failure:
                what.failure = str(failure)
                note(f"round {number + 1}: {describe(task)}: {failure}")
                continue
            what.results.append(result)
            speed, share = result["images_per_second"], result["images_per_second"] / result["limit"]
            note(f"round {number + 1}: {describe(task)}: {speed:,.0f} images/s, {share:.2f} of decoding")
    return found


def versions() -> str:
    """Returns the versions of all that is compared."""
    listed = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            listed.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(listed)


def describe(task: Task) -> str:
    """Returns a task in words."""
    return f"{task.workload}: {task.peer}{' bicubic' * (task.interpolation == 'cubic')}{' cold' * task.cold}"


def note(text: str) -> None:
    """Says how far it is."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=2, help="that decode alone")
    parser.add_argument("--batches", type=int, default=12, help="of 128, counted in a measurement; a multiple of 6")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PEERS), help=", ".join(PEERS))
    parser.add_argument("--workers", type=int, default=0, help="of all peers, instead of what suits each")
    parser.add_argument("--most-workers", type=int, default=3, help="that are tried")
    parser.add_argument("--no-extra", action="store_true", help="neither bicubic nor a cold cache")
    parser.add_argument("--python-path", type=Path, nargs="*", default=[], help="folders with SPDL")
    parser.add_argument("--time-limit", type=float, default=600.0, help="seconds until a measurement has failed")
    parser.add_argument("--note", default="", help="a line for the page")
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    parser.add_argument("--page", type=Path, help="file for the page, instead of standard output")
    options = parser.parse_args()
    if unknown := set(options.only) - set(PEERS):
        parser.error(f"--only {', '.join(sorted(unknown))}; expected some of {', '.join(PEERS)}")
    sys.path.extend(map(str, options.python_path))
    began = time.monotonic()
    bench = Bench(options)
    found = measure_all(bench, options)
    text = page(
        found, options, versions=versions(), num_files=len(bench.files), minutes=(time.monotonic() - began) / 60
    )
    if options.json:
        rows = [
            {"peer": task.peer, "workload": task.workload, "interpolation": task.interpolation, "cold": task.cold,
             "workers": what.workers, "failure": what.failure, "rounds": what.results}
            for task, what in found.items()
        ]  # fmt: skip
        options.json.write_text(json.dumps({"versions": versions(), "tasks": rows}, indent=1) + "\n")
    if options.page:
        options.page.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
