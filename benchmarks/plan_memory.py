"""``maestri plan`` against real steps on a CPU: ``python benchmarks/plan_memory.py RECIPE CASE …``.

Also ``torchrun --standalone --nproc-per-node 2 benchmarks/plan_memory.py …``.  A case is a recipe's flags in one word,
e.g. ``'--method.name mae --engine.zero_stage 2'``.  Of each, two steps are made on noise; then are measured, on rank 0,

- what is kept between steps, by owner, and activations, as ``maestri profile`` measures them;
- gradients, between the backward pass and the optimizer's step;
- the most that a further step allocates at once, by torch's own record of every allocation, and, apart from it, the
  bucket that gradients are reduced in, which would hide the rest of a small model.

Printed as a table of predicted and measured bytes; ``--json`` writes both.
"""

import argparse
import gc
import json
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from maestri.engine import distributed
from maestri.engine.config import RunConfig
from maestri.engine.config_files import load_config
from maestri.engine.continuation import Parts
from maestri.engine.distributed import Ranks
from maestri.engine.finite import FiniteGuard
from maestri.engine.masters import MOMENTS
from maestri.engine.schedules import scheduled
from maestri.engine.start import start_engine
from maestri.engine.step import set_schedules, train_step
from maestri.model.build import build_method
from maestri.pipelines.batch import Batch
from maestri.profiler.memory import step_bytes
from maestri.profiler.plan import Allowance, Forecast
from maestri.profiler.resident import repeated, resident_batch

WARM_UP = 2


class SmallRun:
    """A recipe's training, on one batch of noise."""

    def __init__(self, config: RunConfig, ranks: Ranks, folder: Path) -> None:
        """Builds it; every rank must call it."""
        method = build_method(
            config.method, config.encoder, image_size=config.views.size, num_steps=config.steps, seed=config.seed
        )
        engine, teachers, masters = start_engine(
            method, ranks, batch=config.batch, optimizer=config.optimizer, engine=config.engine
        )
        guard = FiniteGuard(ranks, folder=folder, budget=0, check_gradients=False, keys_of=lambda rows: [])
        self.parts = Parts(
            engine=engine,
            method=method,
            teachers=teachers,
            masters=masters,
            loader=cast(Any, None),
            meter=cast(Any, None),
            guard=guard,
            ranks=ranks,
            control=None,
        )
        self.config = config
        self._step = 0

    def step(self, batches: Iterator[Batch]) -> None:
        """Makes the next optimizer step."""
        config, parts = self.config, self.parts
        settings = scheduled(config.optimizer, self._step, num_steps=config.steps, global_size=config.batch.global_size)
        set_schedules(parts.engine, settings)
        train_step(parts.engine, parts.method, parts.teachers, batches, self._step, guard=parts.guard)
        self._step += 1


def measured(config: RunConfig, ranks: Ranks, folder: Path) -> dict[str, int]:
    """Returns bytes by owner on this rank, and ``peak``, the most in a step but the bucket; every rank must call it."""
    run = SmallRun(config, ranks, folder)
    share = config.batch.micro_size // ranks.world_size
    positions = range(ranks.rank * share, (ranks.rank + 1) * share)
    batch = resident_batch(config.views, patch=config.encoder.patch, seed=0, positions=positions, device=ranks.device)
    for _ in range(WARM_UP):
        run.step(repeated(batch))
    found = step_bytes(run.parts, batch, run.step)
    engine = run.parts.engine
    if config.engine.zero_stage == 0:  # of which the masters' interface shows this rank's share alone
        states = engine.basic_optimizer.state.values()
        found["moments"] = sum(state[key].nbytes for state in states for key in MOMENTS)
    if config.engine.offload == "optimizer":
        pieces = [piece for group in run.parts.masters for piece in group.storage()]
        found["offloaded gradients"] = sum(piece.grad.nbytes for piece in pieces if piece.grad is not None)
    own_step = engine.step

    def noting_step(*arguments: Any, **keywords: Any) -> Any:
        found["gradients"] = gradient_bytes(engine)
        return own_step(*arguments, **keywords)

    def noting_buckets() -> None:
        own_buckets()
        buckets = engine.optimizer.ipg_buckets.values()
        now = sum(buffer.nbytes for bucket in buckets for buffer in bucket.buffer)
        found["bucket"] = max(now, found.get("bucket", 0))

    if config.engine.zero_stage in (1, 2):
        own_buckets = engine.optimizer.setup_buckets
        engine.optimizer.setup_buckets = noting_buckets
    engine.step = noting_step
    run.step(repeated(batch))
    engine.step = own_step
    kept = sum(size for owner, size in found.items() if owner not in ("gradients", "activations", "bucket"))
    most = most_allocated(lambda: run.step(repeated(batch)))
    if config.engine.zero_stage == 3:
        found["bucket"] = sum(bucket.buffer.nbytes for bucket in engine.optimizer.ipg_buckets.values())
        found["peak"] = kept + most + int(engine.optimizer.grad_partitions_flat_buffer.nbytes)
    else:
        found.setdefault("bucket", 0)
        found["peak"] = kept + most - found["bucket"]
    engine.destroy()
    return found


def gradient_bytes(engine: Any) -> int:
    """Returns bytes of gradients that wait for the optimizer's step, each element once."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return int(optimizer.grad_partitions_flat_buffer.nbytes)
    found: list[Tensor | None] = [parameter.grad for parameter in engine.module.parameters()]
    for pieces in (getattr(optimizer, "averaged_gradients", None) or {}).values():
        found += pieces if isinstance(pieces, list) else [pieces]
    places = {tensor.data_ptr(): tensor.nbytes for tensor in found if isinstance(tensor, Tensor) and tensor.numel()}
    return sum(places.values())


def most_allocated(work: Callable[[], None]) -> int:
    """Returns the most bytes that ``work`` has allocated at once, on a CPU."""
    gc.collect()  # the record would also hold the end of what earlier steps have made
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def predicted(config: RunConfig, world_size: int) -> dict[str, int]:
    """Returns what ``measured`` should find."""
    forecast = Forecast(config, world_size)
    images = config.batch.micro_size // world_size
    nothing = Allowance(context_bytes=0, fragmentation=0.0)
    plan = forecast.stage_plan(config.engine.zero_stage, images, nothing)
    batch = forecast.needs(images).batch_bytes
    return {
        **plan.kept,
        "gradients": plan.gradients,
        "activations": plan.activations + plan.gathered,
        "bucket": plan.bucket,
        "peak": sum(plan.kept.values()) + plan.step + batch,
    }


def comparison(case: str, pair: dict[str, dict[str, int]]) -> Table:
    """Returns predicted beside measured bytes of a case."""
    table = Table("bytes on rank 0", "predicted", "measured", "off by", title=case or "as the recipe is")
    for owner, guess in pair["predicted"].items():
        found = pair["measured"].get(owner, 0)
        off = f"{guess / found - 1:+.1%}" if found else "–"
        table.add_row(owner, f"{guess:,}", f"{found:,}", off)
    return table


def main() -> None:
    """Predicts all cases, then measures them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("cases", nargs="*", default=[""], help="a recipe's flags, in one word")
    parser.add_argument("--json", type=Path, help="file for predicted and measured bytes, by case")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    flags = ["--out", "nowhere", "--engine.device", "cpu"]
    configs = {case: load_config(arguments.recipe, [*shlex.split(case), *flags]) for case in arguments.cases}
    found = {case: {"predicted": predicted(config, world_size)} for case, config in configs.items()}
    ranks = distributed.start(distributed.prepare_environment("cpu"), timeout_minutes=2)
    with tempfile.TemporaryDirectory() as folder:
        for case, config in configs.items():
            found[case]["measured"] = measured(config, ranks, Path(folder))
            gc.collect()
    if ranks.is_main:
        for case, pair in found.items():
            Console().print(comparison(case, pair))
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    distributed.leave(0, orderly=True)


if __name__ == "__main__":
    main()
