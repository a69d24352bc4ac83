"""What three profilers tell of the same training step: ours, DeepSpeed's of FLOPs, torch's.

    OMP_NUM_THREADS=1 python benchmarks/profilers.py CONFIG [--steps 8] [--section.field VALUE …]

One resident batch, one engine; steps without a profiler and under each take turns.  FLOPs are set against the sum of
closed forms for this step's matrix products, forward and backward (``formula``).  Printed: how much longer a step takes
under each, what of the FLOPs it counts, and which of the step's doings its report names.
"""

import argparse
import contextlib
import io
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.profiling.flops_profiler import FlopsProfiler
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from maestri.engine import distributed
from maestri.engine.config import RunConfig
from maestri.engine.config_files import load_config
from maestri.pipelines.masks import num_hidden
from maestri.profiler.flops import FlopCounter
from maestri.profiler.parts import parts_of
from maestri.profiler.resident import repeated
from maestri.profiler.timeline import follow_run, seconds_by_part, timeline_of
from maestri.profiler.trial import Trial, opened_trial

WORDS = {
    "teachers, each": r"\b(labelling|reconstruction)_teacher\b",
    "student's encoder": r"\bencoder\b",
    "heads": r"\b(heads|class_head)\b",
    "backward pass, by module": r"\bencoder backward\b",
    "optimizer": r"\boptimizer\b|\bOptimizer.step",
    "averages of teachers": r"\baverage of ",
    "Sinkhorn, codebook": r"\bcollapse device\b",
    "wait for data": r"^data$",
}
"""What a report may name, and what that looks like."""


def formula(config: RunConfig) -> float:
    """Returns the FLOPs of a PL-MAE step with two teachers, of its blocks, embeddings, heads and decoder."""
    encoder, method, views = config.encoder, config.method.plmae, config.views
    tokens = (views.size // encoder.patch) ** 2
    hidden = num_hidden(views.mask.ratio, tokens)
    visible, images = tokens - hidden, views.count * config.batch.global_size

    def blocks(depth: int, dim: int, length: int, ratio: float) -> float:
        return depth * (2 * length * dim * dim * (4 + 2 * ratio) + 4 * length * length * dim)

    def embedded(length: int) -> float:
        return 2 * length * 3 * encoder.patch**2 * encoder.dim

    def head(settings: Any, length: int) -> float:
        widths = [encoder.dim] + [settings.hidden] * (settings.layers - 1) + [settings.bottleneck]
        products = sum(wide * narrow for wide, narrow in zip(widths[:-1], widths[1:], strict=True))
        return 2 * length * (products + settings.bottleneck * settings.prototypes)

    def encoded(length: int) -> float:
        return blocks(encoder.depth, encoder.dim, length + 1, encoder.mlp_ratio) + embedded(length)

    decoder = method.decoder
    decoded = blocks(decoder.depth, decoder.dim, tokens + 1, 4.0)
    decoded += 2 * decoder.dim * (encoder.dim * (visible + 1) + encoder.dim * hidden)
    decoded += 2 * hidden * encoder.dim * method.reconstruction.codes
    heads = head(method.class_level.head, 1) + head(method.data_level.head, visible)
    labelling = encoded(tokens) + heads
    sees = hidden if method.reconstruction.sees == "masked" else tokens
    codes = 2 * hidden * encoder.dim * method.reconstruction.codes
    student = encoded(visible) + decoded + heads
    # Pixels need no gradient.
    return images * (labelling + encoded(sees) + codes + 3 * student - embedded(visible))


def seconds_of(work: Callable[[], object]) -> float:
    """Returns the processor's seconds of a call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def ours(trial: Trial, step: Callable[[], None]) -> tuple[float, float, str]:
    """Returns seconds of a followed step, FLOPs counted in another, and what the parts are called."""
    with timeline_of(trial.parts) as timeline:
        follow_run(timeline, trial.parts)
        with timeline.step():
            seconds = seconds_of(step)
    with FlopCounter(parts_of(trial.parts.method)) as counter:
        step()
    return seconds, float(counter.total), "\n".join(seconds_by_part(timeline.marks()[0]))


def of_deepspeed(trial: Trial, step: Callable[[], None]) -> tuple[float, float, str]:
    """Returns the same by DeepSpeed's profiler."""
    profiler = FlopsProfiler(trial.parts.engine.module, trial.parts.engine)
    profiler.start_profile()
    seconds = seconds_of(step)
    flops = float(profiler.get_total_flops())
    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        profiler.print_model_profile(profile_step=0)
    profiler.end_profile()
    return seconds, flops, report.getvalue()


def of_torch(trial: Trial, step: Callable[[], None]) -> tuple[float, float, str]:
    """Returns the same by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, record_shapes=True, acc_events=True) as found:
        seconds = seconds_of(step)
    rows = found.key_averages()
    return seconds, float(sum(row.flops for row in rows)), "\n".join(row.key for row in rows)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--steps", type=int, default=8, help="of each kind")
    arguments, flags = parser.parse_known_args()
    config = load_config(arguments.config, flags)
    device = distributed.prepare_environment("cpu")
    torch.set_num_threads(max(1, config.engine.threads))
    ranks = distributed.start(device, timeout_minutes=10)
    profilers = {"ours": ours, "DeepSpeed's": of_deepspeed, "torch's": of_torch}
    found: dict[str, list[tuple[float, float, str]]] = {name: [] for name in profilers}
    plain = []
    with tempfile.TemporaryDirectory() as folder, opened_trial(config, ranks, Path(folder)) as trial:
        batches = repeated(trial.resident)

        def step() -> None:
            trial.step(batches)

        step()
        for _ in range(arguments.steps):
            plain.append(seconds_of(step))
            for name, profiler in profilers.items():
                found[name].append(profiler(trial, step))
    true, bare = formula(config), statistics.median(plain)
    console = Console(width=120)
    console.print(f"{arguments.config}: {true / 1e9:,.2f} GFLOP a step; {1e3 * bare:,.0f} ms of processor time without")
    table = Table("", *profilers)
    table.add_row(
        "step ÷ without", *(f"{statistics.median(row[0] for row in rows) / bare:.2f}" for rows in found.values())
    )
    table.add_row("FLOPs ÷ true", *(f"{rows[-1][1] / true:.3f}" for rows in found.values()))
    table.add_row("lines of the report", *(str(len(rows[-1][2].splitlines())) for rows in found.values()))
    for what, word in WORDS.items():
        named = [re.search(word, rows[-1][2], re.MULTILINE) for rows in found.values()]
        table.add_row(what, *("named" if is_named else "–" for is_named in named))
    console.print(table)
    distributed.leave(0, orderly=True)


if __name__ == "__main__":
    main()
