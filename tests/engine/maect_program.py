"""Run by test_maect.py in one or two processes: trains MAE-CT's two stages on synthetic batches.

Usage: maect_program.py OUT CASE …, a CASE being ``stage-zero-precision-accumulation``, e.g. ``tune-1-fp32-1``, writes
``OUT/<rank>.json`` with what ranks_program.py looks at; ``killed`` and ``again`` before it are one run that dies by
SIGKILL two steps after a checkpoint, and its continuation, and ``whole`` is the same run undisturbed.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import ranks_program
import torch
from ranks_program import GLOBAL_SIZE, PATCH, SIZE, STEPS, SyntheticLoader, new_guard, steps

from maestri.engine import continuation, distributed
from maestri.engine.config import BatchConfig, CheckpointConfig, EngineConfig, OptimizerConfig
from maestri.engine.continuation import Parts
from maestri.engine.logs import Meter
from maestri.engine.masters import gather_masters
from maestri.engine.start import start_engine
from maestri.model.build import MethodConfig, build_method
from maestri.model.encoder import EncoderConfig
from maestri.model.maect_config import MaectConfig


def build(
    case: str, ranks: distributed.Ranks, *, depth: int = 2, seed: int = 0, check_gradients: bool = False
) -> Parts:
    """Returns a tiny MAE-CT in its engine, with a queue that wraps around within the run."""
    stage, zero_stage, precision, accumulation = case.split("-")
    maect = MaectConfig(
        stage=stage,
        projector_hidden=24,
        projection=12,
        predictor_hidden=20,
        queue_size=2 * GLOBAL_SIZE,
        top_k=1 if stage == "head" else 4,
        projector_momentum=0.9,
        encoder_momentum=0.95,
    )
    method = build_method(
        MethodConfig(name="maect", maect=maect),
        EncoderConfig(patch=PATCH, dim=28, heads=2, depth=depth, mlp_ratio=1.5),
        image_size=SIZE,
        num_steps=STEPS,
        # One seed, for what is frozen is no part of a resumed optimizer, but must be that of the run before.  Under 3
        # no ReLU's input and no gap between neighbours is within 1e-4 of 0 in these steps; at 2e-6, as under 0,
        # rounding decides a sample's whole gradient.
        seed=3,
    )
    batch = BatchConfig(global_size=GLOBAL_SIZE, accumulation=int(accumulation))
    distributed.seed_everything(seed + ranks.rank)
    engine, teachers, masters = start_engine(
        method,
        ranks,
        batch=batch,
        # The gradient of the projector's last bias is rounding alone, since the predictor's batch norm takes it off
        # again; AdamW divides by a gradient's own size and would let it wander.  Such an eps keeps it where it is.
        optimizer=OptimizerConfig(clip=1.0, layer_decay=0.65, head_weight_decay=1e-5, eps=1e-4),
        engine=EngineConfig(zero_stage=int(zero_stage), precision=precision, device="cpu"),
    )
    loader = SyntheticLoader(rank=ranks.rank, world_size=ranks.world_size, micro_size=batch.micro_size)
    meter = Meter(ranks.device)
    return Parts(
        engine=engine,
        method=method,
        teachers=teachers,
        masters=masters,
        loader=loader,
        meter=meter,
        guard=new_guard(case, ranks, check_gradients=check_gradients),
        ranks=ranks,
        control=None,
    )


def digest(values: dict[str, torch.Tensor]) -> str:
    """Returns a checksum of tensors by name."""
    found = hashlib.sha256()
    for name in sorted(values):
        found.update(name.encode() + values[name].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def life(way: str, case: str, ranks: distributed.Ranks, out: Path) -> dict[str, Any]:
    """Returns losses and checksums of a run that is ``whole``, or of the part of it after it was ``killed``."""
    parts = build(case, ranks, seed=int(way == "again"))
    first = 0
    if way == "again":
        first = continuation.resume(out / "life", parts, config={}).step
    losses = []
    for step, metrics in enumerate(steps(parts, first, STEPS), first + 1):
        losses.append(metrics)
        if step == STEPS // 2 and way == "killed":
            continuation.save(out / "life", parts, step=step, config={}, settings=CheckpointConfig(keep=1))
        if step == STEPS // 2 + 2 and way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    return {
        "losses": losses,
        "weights": digest(gather_masters(parts.masters)),
        "teachers": {role: digest(parts.teachers.gather(role)) for role in parts.teachers},
        "queue": digest(parts.method.state.state_dict()),
    }


def frozen(case: str, ranks: distributed.Ranks) -> dict[str, Any]:
    """Returns whether frozen parameters kept their values, had no gradient and stayed in eval mode under the engine."""
    parts = build(case, ranks)
    student = parts.engine.module
    kept = {name: p.detach().clone() for name, p in student.named_parameters() if not p.requires_grad}
    parts.engine.train()
    list(steps(parts, 0, 2))
    stays = {name: p for name, p in student.named_parameters() if not p.requires_grad}
    still = student.encoder if case.startswith("head") else student.encoder.blocks[0]
    return {
        "names": sorted(kept),
        "unmoved": all(torch.equal(value, kept[name]) for name, value in stays.items()),
        "without_gradient": all(value.grad is None for value in stays.values()),
        "in_eval_mode": not any(module.training for module in still.modules()),
        "trains": student.projector.training,
    }


def main(out: Path, arguments: list[str]) -> None:
    """Runs what is asked for and writes this rank's report."""
    torch.set_num_threads(1)
    device = distributed.prepare_environment("cpu")
    distributed.quiet_libraries()
    ranks = distributed.start(device, timeout_minutes=2)
    ranks_program.build = build
    report: dict[str, Any] = {}
    if arguments[0] in ("whole", "killed", "again"):
        report["life"] = life(arguments.pop(0), arguments.pop(0), ranks, out)
    for case in arguments:
        report[case] = ranks_program.run_case(case, ranks, out)
        if ranks.world_size == 1:
            report[case]["frozen"] = frozen(case, ranks)
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(report))
    distributed.leave(0, orderly=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
