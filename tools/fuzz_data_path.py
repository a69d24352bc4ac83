"""Feeds damaged and hostile images to the data path's header check and, those that pass, to both executors.

    python tools/fuzz_data_path.py [--mutations 10000] [--seed 0]

Nothing may bring the process down or keep it waiting: an image is refused by its header, decoded, or found by the
executor and replaced.  The images go through in processes of their own, so that a crash is seen.  Exit code 1 if there
was one.  The suite runs a short form.
"""

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch

from maestri.pipelines.executor import ExecutorOptions, PlannedBatch, executor_class, group_shapes
from maestri.pipelines.filters import BlurConfig
from maestri.pipelines.header import BadHeader, image_size
from maestri.pipelines.reader import Samples
from maestri.pipelines.views import LocalConfig, ViewsConfig, plan_views

ROOT = Path(__file__).resolve().parent.parent
CHUNK = 500
"""Images that a process is given."""
PATIENCE = 120.0
"""Seconds for a process: some fifty times what it takes."""
BATCH, NUM_SOUND = 16, 2
"""Samples in a batch, and how many of them are undamaged."""
EXECUTORS: tuple[Literal["dali", "threads"], ...] = ("dali", "threads")
CONFIGS = (
    ViewsConfig(size=48, blur=BlurConfig(probability=(0.5,)), solarise=(0.2,), local=LocalConfig(count=2, size=24)),
    ViewsConfig(size=48, count=1),
)
"""Many views of the whole image; one whose window alone is decoded."""


def load(path: Path) -> ModuleType:
    """Returns a module of the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MUTATIONS = load(ROOT / "tests" / "pipelines" / "image_mutations.py")


class FuzzSource:
    """Batches of the damaged images that pass the header check, between sound ones."""

    def __init__(self, numbered: Iterator[tuple[str, bytes]], config: ViewsConfig, log: Path) -> None:
        """Takes images; their names go into the log before they go anywhere else."""
        self._images = numbered
        self._config = config
        self._log = log.open("w")
        self._sound = MUTATIONS.sound_image()
        self.counts: Counter[str] = Counter()

    def plan(self, index: int) -> PlannedBatch | None:
        """Returns a batch."""
        passed = [self._sound] * NUM_SOUND
        for name, data in self._images:
            print(name, file=self._log, flush=True)
            try:
                image_size(data)
                passed.append(data)
                self.counts["passed"] += 1
            except BadHeader:
                self.counts["refused"] += 1
            if len(passed) == BATCH:
                break
        return self._planned(index, passed) if len(passed) > NUM_SOUND else None

    def replace(self, planned: PlannedBatch, bad: Mapping[int, str]) -> PlannedBatch:
        """Returns the batch with a sound image in each bad one's place."""
        assert min(bad) >= NUM_SOUND, f"a sound image was taken for a bad one: {bad}"
        self.counts["replaced"] += len(bad)
        self.counts["batches replaced in"] += 1
        kept = [self._sound if at in bad else data.tobytes() for at, data in enumerate(planned.samples.encoded)]
        return replace(self._planned(0, kept), position=planned.position)

    def _planned(self, index: int, encoded: list[bytes]) -> PlannedBatch:
        widths, heights = np.array([image_size(data) for data in encoded], np.int64).T
        rows = np.arange(len(encoded), dtype=np.int64)
        samples = Samples(
            rows=rows, encoded=[np.frombuffer(data, np.uint8) for data in encoded], widths=widths, heights=heights
        )
        plan = plan_views(self._config, seed=0, positions=rows, widths=widths, heights=heights, patch=8)
        return PlannedBatch(samples=samples, plan=plan, position=index)


def work(start: int, count: int, seed: int, log: Path) -> None:
    """Puts images through, in this process, and prints what became of them."""
    config = CONFIGS[start // CHUNK % len(CONFIGS)]
    options = ExecutorOptions(
        shapes=group_shapes(config),
        batch_size=BATCH,
        device=torch.device("cpu"),
        interpolation=config.interpolation,
        antialias=config.antialias,
        num_threads=2,
        prefetch=2,
    )
    counts: Counter[str] = Counter()
    for name in EXECUTORS:
        source = FuzzSource(itertools.islice(MUTATIONS.images(start + count, seed), start, None), config, log)
        executor = executor_class(name)(source, options)
        for number, (planned, views) in enumerate(executor):
            assert planned.position == number
            assert all(group.shape[1] == len(planned.samples.rows) for group in views.values())
            source.counts["batches"] += 1
        executor.close()
        counts.update({f"{event} by {name}": number for event, number in source.counts.items()})
    print(json.dumps(counts))


def main() -> int:
    """Returns 1 if a process crashed, hung, or failed in another way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", nargs=3, metavar=("START", "COUNT", "LOG"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(int(options.worker[0]), int(options.worker[1]), options.seed, Path(options.worker[2]))
        return 0
    began, failures, counts = time.monotonic(), 0, Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        log, errors = Path(folder) / "names", Path(folder) / "errors"
        for start in range(0, options.mutations, CHUNK):
            count = min(CHUNK, options.mutations - start)
            command = [
                sys.executable,
                __file__,
                "--seed",
                str(options.seed),
                "--worker",
                str(start),
                str(count),
                str(log),
            ]
            with errors.open("wb") as stderr:
                try:
                    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, timeout=PATIENCE, check=False)
                    outcome = f"exit code {done.returncode}" if done.returncode else ""
                except subprocess.TimeoutExpired:
                    outcome = f"nothing after {PATIENCE:.0f} s"
            if outcome:
                failures += 1
                names = log.read_text().splitlines()[-4 * BATCH :] if log.exists() else []
                said = errors.read_text(errors="replace").splitlines()[-12:]
                print(f"images {start} to {start + count}: {outcome}; the last:", *names, *said, sep="\n  ", flush=True)
            else:
                counts.update(json.loads(done.stdout))
    shown = ", ".join(f"{number} {name}" for name, number in counts.items())
    print(f"{options.mutations} images, seed {options.seed}: {shown}; {failures} failures; ", end="")
    print(f"{time.monotonic() - began:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
