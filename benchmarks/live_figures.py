"""What watching a run costs: spans, rows, display and memory figures of the training loop, on against off.

    OMP_NUM_THREADS=1 python benchmarks/live_figures.py CONFIG [--blocks 40] [--section.field VALUE …]

Blocks of as many steps as ``logging.every`` take turns on one resident batch: as training makes them (spans recorded,
metrics summed, one row with utilisation and memory written and shown), and bare.  The processor's time counts, which
other programs on the machine do not lengthen.  Beside it, the watching alone, without a step, as a share of the step.
"""

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from maestri.engine import distributed
from maestri.engine.config_files import load_config
from maestri.engine.display import Display
from maestri.engine.logs import Meter, RunLog
from maestri.engine.spans import SpanRecorder, recording, span
from maestri.profiler.resident import repeated
from maestri.profiler.trial import Trial, opened_trial
from maestri.profiler.utilisation import Utilisation, flops_per_image

SPANS = ("data", "teachers", "student", "loss", "backward", "optimizer", "averages", "stop")
"""Of a step."""


class Watching:
    """What the training loop does to tell how a run goes."""

    def __init__(self, trial: Trial, flops: float, out: Path) -> None:
        config = trial.config
        self._trial = trial
        self._meter = Meter(trial.ranks.device)
        self._spans = SpanRecorder(trial.ranks.device)
        self._log = RunLog(out, first_step=0)
        self._utilisation = Utilisation(config, trial.ranks, flops)
        console = Console(file=io.StringIO(), force_terminal=True, width=100)
        self._display = Display(title="x", steps=10**9, first_step=0, enabled=True, console=console)
        self._step = 0
        self._images = config.batch.global_size

    def __enter__(self) -> "Watching":
        self._display.__enter__()
        return self

    def __exit__(self, *problem: object) -> None:
        self._display.__exit__(None, None, None)
        self._log.close()

    def block(self, steps: int, *, with_step: bool) -> None:
        """Makes steps, and the row behind them."""
        batches = repeated(self._trial.resident)
        with recording(self._spans):
            for _ in range(steps):
                self._meter.go_on()
                if with_step:
                    self._trial.step(batches)
                else:
                    for name in SPANS:
                        with span(name):
                            pass
                self._meter.add(METRICS, num_images=self._images)
                self._step += 1
                self._display.advance(self._step)
        row = self._meter.take(wait_seconds=0.0, bad_samples=0)
        row |= self._utilisation.row(row["images_per_second"])
        row |= {f"seconds/{name}": seconds for name, seconds in self._spans.take().items()}
        self._log.write("train", self._step, row)
        self._display.update(self._step, row)
        self._meter.pause()


METRICS = {name: torch.ones(()) for name in ("loss", "loss_class", "loss_data", "loss_reconstruction")}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--blocks", type=int, default=40, help="of each kind")
    arguments, flags = parser.parse_known_args()
    config = load_config(arguments.config, flags)
    flops = flops_per_image(config)
    device = distributed.prepare_environment("cpu")
    torch.set_num_threads(max(1, config.engine.threads))
    ranks = distributed.start(device, timeout_minutes=10)
    every = config.logging.every
    found: dict[str, list[float]] = {"watched": [], "bare": [], "watching": []}
    with tempfile.TemporaryDirectory() as folder, opened_trial(config, ranks, Path(folder)) as trial:
        with Watching(trial, flops, Path(folder)) as watching:
            batches = repeated(trial.resident)
            for number in range(arguments.blocks + 1):
                for kind in found if number % 2 else reversed(found):
                    began = time.process_time()
                    if kind == "bare":
                        for _ in range(every):
                            trial.step(batches)
                    else:
                        watching.block(every, with_step=kind == "watched")
                    if number:  # the first ones warm up
                        found[kind].append((time.process_time() - began) / every)
    bare = statistics.median(found["bare"])
    ratios = sorted(watched / plain - 1 for watched, plain in zip(found["watched"], found["bare"], strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    print(f"a bare step: {1e3 * bare:.2f} ms of processor time ({config.batch.global_size} images)")
    print(f"watched ÷ bare − 1: median {statistics.median(ratios):+.2%}, quartiles {low:+.2%} and {high:+.2%}")
    alone = statistics.median(found["watching"])
    print(f"watching alone: {1e6 * alone:.0f} µs a step, a row every {every} steps: {alone / bare:.2%} of the step")
    distributed.leave(0, orderly=True)


if __name__ == "__main__":
    main()
