"""Run by test_ranks.py in one or two processes: trains PL-MAE on synthetic batches at several ZeRO stages.

Writes ``OUT/<rank>.json`` with what the tests look at.  Usage: ranks_program.py OUT CASE …, a CASE being
``stage-precision-accumulation``, e.g. ``2-bf16-1``.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from maestri.engine import checkpoint, distributed
from maestri.engine.checkpoint import Parts
from maestri.engine.config import BatchConfig, EngineConfig, OptimizerConfig
from maestri.engine.errors import CheckpointError
from maestri.engine.logs import Meter
from maestri.engine.masters import gather_masters
from maestri.engine.start import start_engine
from maestri.engine.step import set_learning_rate, train_step
from maestri.model.build import MethodConfig, build_method
from maestri.model.decoder import DecoderConfig
from maestri.model.encoder import EncoderConfig
from maestri.model.heads import HeadConfig
from maestri.model.plmae_config import LevelConfig, MomentumConfig, PlmaeConfig, ReconstructionConfig
from maestri.pipelines.batch import Batch

SIZE, PATCH, GLOBAL_SIZE, STEPS = 16, 4, 16, 6


class SyntheticLoader:
    """Noise whose pixels and masks are functions of the global position, sliced over ranks."""

    def __init__(self, *, rank: int, world_size: int, micro_size: int) -> None:
        self.position, self.micro_size = 0, micro_size
        share = micro_size // world_size
        self.slice = slice(rank * share, (rank + 1) * share)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        generator = torch.Generator().manual_seed(self.position)
        shape = (2, self.micro_size, 3, SIZE, SIZE)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        tokens = (SIZE // PATCH) ** 2
        order = torch.rand((2, self.micro_size, tokens), generator=generator).argsort(-1)
        visible, masked = order[..., : tokens // 4].sort(-1)[0], order[..., tokens // 4 :].sort(-1)[0]
        mask = torch.ones((2, self.micro_size, tokens), dtype=torch.bool).scatter_(-1, visible, False)
        rows = torch.arange(self.position, self.position + self.micro_size)
        position, self.position = self.position, self.position + self.micro_size
        return Batch(
            views={"global": images[:, self.slice]},
            token_mask={"global": mask[:, self.slice]},
            visible={"global": visible[:, self.slice]},
            masked={"global": masked[:, self.slice]},
            labels=torch.full_like(rows, -1)[self.slice],
            rows=rows[self.slice],
            position=position + self.slice.start,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def build(case: str, ranks: distributed.Ranks, *, depth: int = 1, seed: int = 0) -> Parts:
    """Returns a tiny PL-MAE in its engine, with momenta low enough that teachers move in a few steps."""
    stage, precision, accumulation = case.split("-")
    head = HeadConfig(hidden=20, layers=2, bottleneck=12, prototypes=10)
    level = LevelConfig(head=head, me_max=0.5)
    plmae = PlmaeConfig(
        decoder=DecoderConfig(dim=24, depth=1, heads=2),
        class_level=level,
        data_level=level,
        reconstruction=ReconstructionConfig(head=head, codes=16),
        labelling_momentum=MomentumConfig(start=0.9, end=0.99),
        reconstruction_momentum=MomentumConfig(start=0.99, end=0.999),
    )
    method = build_method(
        MethodConfig(name="plmae", plmae=plmae),
        EncoderConfig(patch=PATCH, dim=28, heads=2, depth=depth, mlp_ratio=1.5),
        image_size=SIZE,
        num_steps=STEPS,
        seed=seed,
    )
    batch = BatchConfig(global_size=GLOBAL_SIZE, accumulation=int(accumulation))
    distributed.seed_everything(seed + ranks.rank)
    engine, teachers, masters = start_engine(
        method,
        ranks,
        batch=batch,
        optimizer=OptimizerConfig(clip=1.0),
        engine=EngineConfig(zero_stage=int(stage), precision=precision, device="cpu"),  # type: ignore[arg-type]
    )
    loader = SyntheticLoader(rank=ranks.rank, world_size=ranks.world_size, micro_size=batch.micro_size)
    return Parts(
        engine=engine,
        method=method,
        teachers=teachers,
        masters=masters,
        loader=loader,
        meter=Meter(ranks.device),
        ranks=ranks,
        control=None,
    )


def mean_metrics(metrics: Any) -> dict[str, float]:
    """Returns metrics averaged over ranks."""
    names = sorted(metrics)
    values = distributed.mean_over_ranks(torch.stack([metrics[name].double() for name in names])).tolist()
    return dict(zip(names, values, strict=True))


def steps(parts: Parts, first: int, last: int) -> Iterator[dict[str, float]]:
    """Yields the metrics of each optimizer step."""
    for step in range(first, last):
        set_learning_rate(parts.engine, 1e-2)
        yield mean_metrics(train_step(parts.engine, parts.method, parts.teachers, parts.loader, step).metrics)  # type: ignore[arg-type]


def relative(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Returns ‖found − reference‖ / ‖reference‖ over all parameters of the reference."""
    difference = sum(float((found[name].double() - value).square().sum()) for name, value in reference.items())
    norm = sum(float(value.square().sum()) for value in reference.values())
    return float((difference / norm) ** 0.5)


def run_case(case: str, ranks: distributed.Ranks, out: Path) -> dict[str, Any]:
    """Trains, compares every teacher with a float64 average of gathered masters, saves, resumes, goes on."""
    parts = build(case, ranks)
    follows = {role: tuple(teacher.follows) for role, teacher in parts.method.teachers.items()}
    masters = gather_masters(parts.masters)
    references = {
        role: {name: value.double() for name, value in masters.items() if name.startswith(prefixes)}
        for role, prefixes in follows.items()
    }
    starts = {role: dict(reference) for role, reference in references.items()}
    losses: list[dict[str, float]] = []
    for step, metrics in enumerate(steps(parts, 0, STEPS)):
        losses.append(metrics)
        masters = gather_masters(parts.masters)
        for role, reference in references.items():
            momentum = parts.method.teachers[role].momentum(step)
            references[role] = {n: momentum * v + (1 - momentum) * masters[n].double() for n, v in reference.items()}
        if step + 1 == STEPS // 2:
            saved = checkpoint.save(out / case, parts, step=step + 1, config={"case": case}, keep=1)
    teachers: dict[str, Any] = {}
    for role, teacher in parts.method.teachers.items():
        average = parts.teachers.gather(role)
        module = dict(teacher.module.named_parameters())
        teachers[role] = {
            "error": relative(average, references[role]),
            "moved": relative({n: average[n] for n in starts[role]}, starts[role]),
            "all_moved": all(not torch.equal(average[n].double(), v) for n, v in starts[role].items()),
            "module_is_rounded_average": all(
                torch.equal(module[n].data, average[n].to(module[n].dtype)) for n in references[role]
            ),
            "no_gradients": all(p.grad is None and not p.requires_grad for p in module.values()),
        }
    final = gather_masters(parts.masters)
    again = build(case, ranks, seed=1)
    first = checkpoint.resume(saved, again, config={"case": case})
    resumed = list(steps(again, first, STEPS))
    after = gather_masters(again.masters)
    return {
        "losses": losses,
        "teachers": teachers,
        "resumed_losses_equal": resumed == losses[first:],
        "resumed_weights_equal": all(torch.equal(final[name], after[name]) for name in final),
        "resumed_teachers_equal": all(
            torch.equal(value, again.teachers.gather(role)[name])
            for role in follows
            for name, value in parts.teachers.gather(role).items()
        ),
    }


def refusals(ranks: distributed.Ranks, out: Path, case: str) -> dict[str, str]:
    """Returns the lines with which unfitting checkpoints are refused."""
    saved = checkpoint.latest(out / case)
    assert saved is not None
    lines = {}
    for name, parts, config in (
        ("model", build(case, ranks, depth=2), {"case": case}),
        ("config", build(case, ranks), {"case": "other"}),
    ):
        try:
            checkpoint.resume(saved, parts, config=config)
        except CheckpointError as error:
            lines[name] = str(error)
    return lines


def full_disk(ranks: distributed.Ranks, out: Path, case: str) -> dict[str, Any]:
    """Returns what happens when the last rank's disk fills up while DeepSpeed writes."""
    parts = build(case, ranks)
    write = parts.engine.checkpoint_engine.save

    def full(state_dict: Any, path: str) -> None:
        if ranks.rank == ranks.world_size - 1:
            raise OSError(28, "No space left on device", path)
        write(state_dict, path)

    before = checkpoint.latest(out / case)
    parts.engine.checkpoint_engine.save = full
    line = ""
    try:
        checkpoint.save(out / case, parts, step=STEPS, config={"case": case}, keep=1)
    except CheckpointError as error:
        line = str(error)
    parts.engine.checkpoint_engine.save = write
    names = sorted(path.name for path in (out / case / "checkpoints").iterdir())
    return {"line": line, "kept": checkpoint.latest(out / case) == before, "names": names}


def main(out: Path, cases: list[str]) -> None:
    """Runs every case and writes this rank's report."""
    torch.set_num_threads(1)
    device = distributed.prepare_environment("cpu")
    distributed.quiet_libraries()
    ranks = distributed.start(device, timeout_minutes=2)
    report: dict[str, Any] = {case: run_case(case, ranks, out) for case in cases}
    report["refusals"] = refusals(ranks, out, cases[0])
    report["full_disk"] = full_disk(ranks, out, cases[-1])
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(report))
    distributed.leave(0, orderly=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
