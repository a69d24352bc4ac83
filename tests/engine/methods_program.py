"""Run by test_methods.py in two processes: each method's Fashion-MNIST recipe makes a few steps at several ZeRO stages.

Writes ``OUT/<rank>.json``: by method and stage the losses, and how far the teachers have moved.  Usage:
methods_program.py OUT METHOD …
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from maestri.engine import distributed
from maestri.engine.config import RunConfig
from maestri.engine.config_files import load_config
from maestri.engine.distributed import Ranks
from maestri.engine.finite import FiniteGuard
from maestri.engine.schedules import scheduled
from maestri.engine.start import start_engine
from maestri.engine.step import set_schedules, train_step
from maestri.model.build import build_method
from maestri.pipelines.order import slice_of
from maestri.profiler.resident import resident_batch

STAGES = (0, 1, 3)
STEPS = 3
CONFIGS = Path(__file__).parents[2] / "configs"


def recipe(method: str, stage: int) -> RunConfig:
    """Returns a method's recipe in float32, of few images and few steps, without warm-up."""
    flags = {
        "out": "nowhere",
        "steps": "10",
        "batch.global_size": "8",
        "engine.zero_stage": str(stage),
        "engine.precision": "fp32",
        "optimizer.warmup": "0",
        "optimizer.freeze_prototypes": "0",
    }
    flags |= {"method.sdae.update-every": "1"} if method == "sdae" else {}
    arguments = [word for name, value in flags.items() for word in (f"--{name}", value)]
    return load_config(CONFIGS / f"fashion_mnist_{method}.yaml", arguments)


def trained(config: RunConfig, ranks: Ranks, folder: Path) -> dict[str, object]:
    """Returns the losses of some steps, and by how much each teacher has moved."""
    method = build_method(config.method, config.encoder, image_size=config.views.size, num_steps=config.steps, seed=0)
    distributed.seed_everything(0)
    engine, teachers, _ = start_engine(
        method, ranks, batch=config.batch, optimizer=config.optimizer, engine=config.engine
    )
    guard = FiniteGuard(
        ranks, folder=folder, budget=0, check_gradients=False, keys_of=lambda rows: list(map(str, rows))
    )
    before = {role: probe(teacher.module) for role, teacher in method.teachers.items()}
    losses = []
    for step in range(STEPS):
        size = config.batch.global_size
        own = slice_of(ranks.rank, ranks.world_size, size)
        positions = range(step * size, (step + 1) * size)[own]
        batch = resident_batch(
            config.views, patch=config.encoder.patch, seed=0, positions=positions, device=ranks.device
        )
        config_now = scheduled(config.optimizer, step, num_steps=config.steps, global_size=size)
        set_schedules(engine, config_now)
        result = train_step(engine, method, teachers, iter([batch]), step, guard=guard)
        losses.append(distributed.mean_over_ranks(result.metrics["loss"].detach().double().clone()).item())
    moved = {role: probe(teacher.module) - before[role] for role, teacher in method.teachers.items()}
    engine.destroy()
    return {"losses": losses, "moved": moved}


def probe(module: nn.Module) -> float:
    """Returns a number that tells whether a module's weights have changed."""
    return sum(float(tensor.double().abs().sum()) for tensor in module.parameters())


def main(out: Path, methods: list[str]) -> None:
    """Trains each method at each stage."""
    torch.set_num_threads(1)
    ranks = distributed.start(distributed.prepare_environment("cpu"), timeout_minutes=2)
    found = {f"{method} {stage}": trained(recipe(method, stage), ranks, out) for method in methods for stage in STAGES}
    (out / f"{ranks.rank}.json").write_text(json.dumps(found))
    distributed.leave(0, orderly=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
