"""What the profiler says that a fix would give, against the fix: bottlenecks planted into a real step on real shards.

    OMP_NUM_THREADS=1 python benchmarks/profile_predictions.py CONFIG [--rounds 6] [--steps 6] [--section.field VALUE …]

For each bottleneck the recipe is profiled with it, in turns with the step after the fix, which the profile predicts.
The ratio is predicted / measured, a step being the median over rounds of a round's mean; beside it, the middle half of
the fixed side's rounds.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from maestri.engine import distributed
from maestri.engine.config import RunConfig
from maestri.engine.config_files import load_config
from maestri.pipelines import pixel_ops
from maestri.pipelines.colour import ColourConfig
from maestri.pipelines.filters import BlurConfig
from maestri.profiler.causes import Evidence, judge, predicted_step
from maestri.profiler.experiments import without_colour
from maestri.profiler.findings import CACHED, CROWDED, REAL, RESIDENT
from maestri.profiler.measure import stages_of
from maestri.profiler.trial import Trial, mode_times, opened_trial, other_loader
from maestri.shards.shard_set import ShardSet

MODES = (REAL, RESIDENT, CACHED, CROWDED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bottleneck:
    """A bottleneck and its fix."""

    name: str
    """What is slow, and what is done about it."""
    slow: Callable[[RunConfig], RunConfig]
    """The recipe with the bottleneck."""
    fixed: Callable[[RunConfig], RunConfig]
    """The recipe without it."""
    predicted: Callable[[Evidence], float]
    """The step's seconds after the fix."""
    delays: tuple[tuple[Any, str, Callable[..., float]], ...] = ()
    """Functions that sleep first: owner, name, seconds by arguments."""
    fix_lifts: bool = False
    """Whether the fix takes the delays away."""


@contextmanager
def delayed(places: tuple[tuple[Any, str, Callable[..., float]], ...]) -> Iterator[None]:
    """Lets functions sleep first, inside the block."""
    with ExitStack() as stack:
        for owner, name, seconds in places:
            original = getattr(owner, name)

            def call(*arguments: Any, _original: Any = original, _seconds: Any = seconds, **keywords: Any) -> Any:
                time.sleep(_seconds(*arguments))
                return _original(*arguments, **keywords)

            setattr(owner, name, call)
            stack.callback(setattr, owner, name, original)
        yield


def data(config: RunConfig, **changes: Any) -> RunConfig:
    """Returns a recipe with other settings of ``data``."""
    return replace(config, data=replace(config.data, **changes))


def heavy(config: RunConfig) -> RunConfig:
    """Returns a recipe whose views are all jittered and blurred."""
    colour = ColourConfig(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    blur = BlurConfig(probability=(1.0,), sigma=(2.0, 4.0))
    return replace(config, views=replace(config.views, colour=colour, blur=blur))


def plain(config: RunConfig) -> RunConfig:
    """Returns a recipe whose views have no colours and no blur."""
    return replace(config, views=replace(config.views, colour=ColourConfig(), blur=BlurConfig(), solarise=(0.0,)))


def bottlenecks(pause: float) -> list[Bottleneck]:
    """Returns what is planted; ``pause`` is the delay of an image, in seconds."""
    store = (ShardSet, "read_checked", lambda shards, rows: pause * len(rows))
    decode = (pixel_ops.simplejpeg, "decode_jpeg", lambda *_: pause)
    resize = (pixel_ops.PixelOps, "_resize", lambda *_: pause / 2)
    few = {"num_threads": 1, "read_threads": 1}
    return [
        Bottleneck(
            name="store answers late; a fast one",
            slow=lambda config: data(config, **few),
            fixed=lambda config: data(config, **few),
            predicted=lambda evidence: predicted_step(evidence, without="store"),
            delays=(store,),
            fix_lifts=True,
        ),
        Bottleneck(
            name="store answers late; data.read_threads 1 → 2",
            slow=lambda config: data(config, **few),
            fixed=lambda config: data(config, num_threads=1, read_threads=2),
            predicted=lambda evidence: predicted_step(evidence, readers=2),
            delays=(store,),
        ),
        Bottleneck(
            name="decoding waits; data.num_threads 1 → 2",
            slow=lambda config: data(config, **few),
            fixed=lambda config: data(config, num_threads=2, read_threads=1),
            predicted=lambda evidence: predicted_step(evidence, threads=2),
            delays=(decode,),
        ),
        Bottleneck(
            name="decoding waits; no decoding to speak of",
            slow=lambda config: data(config, **few),
            fixed=lambda config: data(config, **few),
            predicted=lambda evidence: predicted_step(evidence, without="decode"),
            delays=(decode,),
            fix_lifts=True,
        ),
        Bottleneck(
            name="a view resizes slowly; data.num_threads 1 → 2",
            slow=lambda config: data(config, **few),
            fixed=lambda config: data(config, num_threads=2, read_threads=1),
            predicted=lambda evidence: predicted_step(evidence, threads=2),
            delays=(resize,),
        ),
        Bottleneck(
            name="jitter and blur in every view; none",
            slow=lambda config: heavy(data(config, **few)),
            fixed=lambda config: plain(data(config, **few)),
            predicted=lambda evidence: predicted_step(evidence, scale={"augment": without_colour(evidence)}),
        ),
        Bottleneck(
            name="any data at all; one resident batch",
            slow=lambda config: heavy(data(config, **few)),
            fixed=lambda config: heavy(data(config, **few)),
            predicted=lambda evidence: evidence.modes[RESIDENT].step,
        ),
    ]


def measure(trial: Trial, planted: Bottleneck, steps: int, rounds: int) -> tuple[str, ...]:
    """Returns a row of the table; each round has the modes with the bottleneck, and the step after the fix."""
    slow, fixed = planted.slow(trial.config), planted.fixed(trial.config)
    lifted = () if planted.fix_lifts else planted.delays
    resident = planted.name.endswith("resident batch")
    found: dict[str, list[tuple[list[float], float]]] = {name: [] for name in (*MODES, "fixed")}
    rates = []
    for _ in range(rounds):
        with delayed(planted.delays), other_loader(trial, slow):
            rates.append(trial.loader_alone(steps))
            for name in MODES:
                found[name].append(trial.mode(name, steps, lambda: None))
        with delayed(lifted), other_loader(trial, fixed):
            found["fixed"].append(trial.mode(RESIDENT if resident else REAL, steps, lambda: None))
    with delayed(planted.delays), other_loader(trial, slow):
        stages = stages_of(trial, steps=steps)
    evidence = Evidence(
        modes={name: mode_times(found[name]) for name in MODES},
        images=slow.batch.global_size,
        world_size=1,
        stages=stages,
        loader_rate=statistics.median(rates),
        parts={},
        cores=len(os.sched_getaffinity(0)),
        num_threads=slow.data.num_threads,
        read_threads=slow.data.read_threads,
        on_gpu=False,
    )
    before, after = evidence.modes[REAL], mode_times(found["fixed"])
    expected = planted.predicted(evidence)
    middle = statistics.quantiles(after.means, n=4)
    return (
        planted.name,
        judge(evidence).cause,
        f"{1e3 * before.step:,.0f}",
        f"{1e3 * expected:,.0f}",
        f"{1e3 * after.step:,.0f}",
        f"{expected / after.step:.2f}",
        f"{1e3 * middle[0]:,.0f} to {1e3 * middle[2]:,.0f}",
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--steps", type=int, default=6, help="of a mode in a round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--pause", type=float, default=5.0, help="milliseconds that a delayed image takes longer")
    arguments, flags = parser.parse_known_args()
    config = load_config(arguments.config, flags)
    device = distributed.prepare_environment("cpu")
    torch.set_num_threads(max(1, config.engine.threads))
    ranks = distributed.start(device, timeout_minutes=10)
    columns = ("bottleneck; fix", "found", "step, ms", "predicted", "fixed", "ratio", "fixed, middle half")
    table = Table(*columns, title=str(arguments.config))
    with tempfile.TemporaryDirectory() as folder, opened_trial(config, ranks, Path(folder)) as trial:
        for planted in bottlenecks(arguments.pause / 1000):
            row = measure(trial, planted, arguments.steps, arguments.rounds)
            print(*row, sep=" | ", file=sys.stderr, flush=True)
            table.add_row(*row)
    Console(width=130).print(table)
    distributed.leave(0, orderly=True)


if __name__ == "__main__":
    main()
