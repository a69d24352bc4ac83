"""Run by test_ranks.py in one or two processes: trains PL-MAE on synthetic batches at several ZeRO stages.

Writes ``OUT/<rank>.json`` with what the tests look at.  Usage: ranks_program.py OUT CASE …, a CASE being
``stage-precision-accumulation``, e.g. ``2-bf16-1``, with ``-compile``, ``-recompute`` or ``-offload``, or
``FOLDER/CASE>CASE@STEP``: the first one's run, found in FOLDER, goes on as the second until STEP.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from maestri.engine import checkpoint, continuation, distributed
from maestri.engine import teachers as averaging
from maestri.engine.config import BatchConfig, CheckpointConfig, EngineConfig, OptimizerConfig
from maestri.engine.continuation import Parts
from maestri.engine.errors import CheckpointError, NonFiniteLoss, NonFiniteWeights
from maestri.engine.finite import FiniteGuard
from maestri.engine.logs import Meter
from maestri.engine.masters import gather_masters, gather_moments, num_updates
from maestri.engine.schedules import Scheduled
from maestri.engine.start import start_engine
from maestri.engine.step import set_schedules, train_step
from maestri.model.build import MethodConfig, build_method
from maestri.model.decoder import DecoderConfig
from maestri.model.encoder import EncoderConfig
from maestri.model.heads import HeadConfig
from maestri.model.levels import LevelConfig, MomentumConfig
from maestri.model.plmae_config import PlmaeConfig, ReconstructionConfig
from maestri.pipelines.batch import Batch

SIZE, PATCH, GLOBAL_SIZE, STEPS = 16, 4, 16, 6
LONG = ("0-fp32-1", "1-bf16-1", "3-bf16-1")
"""Cases whose teachers are averaged a thousand times."""
KEEP_ONE = CheckpointConfig(keep=1)
SKIPPED = Path(sys.argv[1]) / "skipped"


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


def build(
    case: str, ranks: distributed.Ranks, *, depth: int = 1, seed: int = 0, check_gradients: bool = False
) -> Parts:
    """Returns a tiny PL-MAE in its engine, with momenta low enough that teachers move in a few steps."""
    stage, precision, accumulation, *more = case.split("-")
    head = HeadConfig(hidden=20, layers=2, bottleneck=13, prototypes=11)  # odd: at ZeRO 3 a shard has padding
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
        engine=EngineConfig(
            zero_stage=int(stage),
            precision=precision,
            device="cpu",
            compile="compile" in more,
            activation_checkpointing="recompute" in more,
            offload="optimizer" if "offload" in more else "nothing",
            check_gradients=check_gradients,
        ),
    )
    loader = SyntheticLoader(rank=ranks.rank, world_size=ranks.world_size, micro_size=batch.micro_size)
    return Parts(
        engine=engine,
        method=method,
        teachers=teachers,
        masters=masters,
        loader=loader,
        meter=Meter(ranks.device),
        guard=new_guard(case, ranks, check_gradients=check_gradients),
        ranks=ranks,
        control=None,
    )


def new_guard(case: str, ranks: distributed.Ranks, *, check_gradients: bool) -> FiniteGuard:
    """Returns what lets a run skip one step."""
    return FiniteGuard(
        ranks,
        folder=SKIPPED / case,
        budget=1,
        check_gradients=check_gradients,
        keys_of=lambda rows: [f"key {row}" for row in rows],
    )


def mean_metrics(metrics: Any) -> dict[str, float]:
    """Returns metrics averaged over ranks."""
    names = sorted(metrics)
    values = distributed.mean_over_ranks(torch.stack([metrics[name].double() for name in names])).tolist()
    return dict(zip(names, values, strict=True))


def steps(parts: Parts, first: int, last: int) -> Iterator[dict[str, float]]:
    """Yields the metrics of each optimizer step."""
    for step in range(first, last):
        set_schedules(parts.engine, Scheduled(learning_rate=1e-2, weight_decay=0.05, prototypes_frozen=False))
        result = train_step(parts.engine, parts.method, parts.teachers, parts.loader, step, guard=parts.guard)
        assert result.applied
        yield mean_metrics(result.metrics)


def relative(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Returns ‖found − reference‖ / ‖reference‖ over all parameters of the reference."""
    difference = sum(float((found[name].double() - value).square().sum()) for name, value in reference.items())
    norm = sum(float(value.square().sum()) for value in reference.values())
    return float((difference / norm) ** 0.5)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Returns whether every tensor found is, bit by bit, the expected one."""
    return all(torch.equal(value.float(), expected[name].float()) for name, value in found.items())


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
            continuation.save(out / case, parts, step=step + 1, config={"case": case}, settings=KEEP_ONE)
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
    first = continuation.resume(out / case, again, config={"case": case}).step
    resumed = list(steps(again, first, STEPS))
    after = gather_masters(again.masters)
    ended = {role: parts.teachers.gather(role) for role in follows}
    equal = all(same(again.teachers.gather(role), ended[role]) for role in follows)
    if ranks.is_main:
        save_file(final | {f"{role}/{n}": v for role in ended for n, v in ended[role].items()}, out / f"{case}.ended")
    return {
        "losses": losses,
        "teachers": teachers,
        "update": cost_of_update(again),
        "long_average": long_average(again) if case in LONG else {},
        "skipping": skipping(case, ranks) if "compile" not in case else {},
        "odd_gradients": [odd_gradients(case, ranks, check=c) for c in (False, True)] if "compile" not in case else [],
        "resumed_losses_equal": resumed == losses[first:],
        "resumed_weights_equal": all(torch.equal(final[name], after[name]) for name in final),
        "resumed_teachers_equal": equal,
    }


class Poison(torch.autograd.Function):
    """The identity, whose gradient is not a number."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.nan


def everything(parts: Parts) -> dict[str, torch.Tensor]:
    """Returns all that a skipped step must leave as it is, but the learning rate."""
    found = gather_masters(parts.masters) | gather_moments(parts.masters)
    found |= {f"{role}/{n}": v for role in parts.teachers for n, v in parts.teachers.gather(role).items()}
    found |= {f"state/{n}": v.clone() for n, v in parts.method.state.state_dict().items()}
    module = {f"module/{n}": p.detach().clone() for n, p in parts.engine.module.named_parameters() if p.numel()}
    return found | module | {"updates": torch.tensor(num_updates(parts.engine))}


@contextmanager
def spoilt(parts: Parts, what: str) -> Iterator[None]:
    """Makes the last rank's loss infinite, or its gradient not a number, in the first micro-batch inside the block."""
    method: Any = parts.method
    loss_of, calls = method.loss, itertools.count()

    def spoil(outputs: Any, targets: Any, step: int) -> Any:
        loss, metrics = loss_of(outputs, targets, step)
        if next(calls) == 0 and parts.ranks.rank == parts.ranks.world_size - 1:
            loss = loss * torch.inf if what == "loss" else Poison.apply(loss)
        return loss, metrics

    method.loss = spoil
    yield
    method.loss = loss_of


def one_step(parts: Parts, step: int) -> bool:
    """Trains a step; returns whether it was applied."""
    return train_step(parts.engine, parts.method, parts.teachers, parts.loader, step, guard=parts.guard).applied


def skipping(case: str, ranks: distributed.Ranks) -> dict[str, Any]:
    """Returns what a loss that is not finite does to a run: once, and once too often."""
    parts = build(case, ranks)
    list(steps(parts, 0, 2))
    before = everything(parts)
    with spoilt(parts, "loss"):
        applied = one_step(parts, 2)
    kept = same(everything(parts), before)
    lines = (SKIPPED / case / f"rank_{ranks.rank:05d}.jsonl").read_text().splitlines()
    list(steps(parts, 3, 4))
    after = everything(parts)
    line = ""
    with spoilt(parts, "loss"):
        try:
            one_step(parts, 4)
        except NonFiniteLoss as error:
            line = str(error)
    return {
        "applied": applied,
        "kept": kept,
        "moved": not same(gather_masters(parts.masters), before),
        "finite": all(bool(value.isfinite().all()) for value in after.values()),
        "notes": [json.loads(text) for text in lines],
        "line": line,
    }


def odd_gradients(case: str, ranks: distributed.Ranks, *, check: bool) -> dict[str, Any]:
    """Returns whether a step is applied whose gradient is not a number, and how its weights are not saved."""
    parts = build(case, ranks, check_gradients=check)
    before = gather_masters(parts.masters)
    with spoilt(parts, "gradient"):
        applied = one_step(parts, 0)
    line = ""
    try:
        continuation.save(SKIPPED / f"{case} {check}", parts, step=1, config={}, settings=KEEP_ONE)
    except NonFiniteWeights as error:
        line = str(error)
    return {"applied": applied, "kept": same(gather_masters(parts.masters), before), "line": line}


def cost_of_update(parts: Parts) -> dict[str, Any]:
    """Returns, by teacher, collectives of an update, optimizer groups followed, and floats kept on this rank."""
    names = ("all_gather_into_tensor", "all_reduce", "broadcast", "reduce_scatter_tensor", "all_gather", "barrier")
    originals = {name: getattr(dist, name) for name in names}
    count = 0

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal count
            count += 1
            return originals[name](*arguments, **keywords)

        return call

    for name in names:
        setattr(dist, name, counted(name))
    parts.teachers.update(STEPS)
    for name, original in originals.items():
        setattr(dist, name, original)
    groups = {role: [g for g in parts.masters if role in g.name.split("/")[0].split("+")] for role in parts.teachers}
    return {
        "collectives": count,
        "groups": sum(len(found) for found in groups.values()),
        "floats": {role: sum(piece.numel() for piece in parts.teachers.pieces(role)) for role in groups},
        "followed": {
            role: sum(p.numel() for n, p in parts.teachers.gather(role).items() if any(n in g.names for g in found))
            for role, found in groups.items()
        },
        "parameters": sum(len(group.names) for found in groups.values() for group in found),
    }


@torch.no_grad()
def long_average(parts: Parts, *, updates: int = 1000, momentum: float = 0.9999) -> dict[str, float]:
    """Returns, by teacher, ‖average − float64 average‖ / ‖float64 average‖ after many updates of wandering masters."""
    generator = torch.Generator().manual_seed(parts.ranks.rank)
    references = {role: [piece.double() for piece in parts.teachers.pieces(role)] for role in parts.teachers}
    for teacher in parts.method.teachers.values():
        teacher.momentum = lambda step: momentum
    gather_shares = averaging.gather_shares
    for step in range(updates):
        for group in parts.masters:
            for piece in group.local():
                piece += 0.01 * torch.randn(piece.shape, generator=generator)
        # Modules need the averages after the last one only.
        averaging.gather_shares = gather_shares if step + 1 == updates else lambda *_: None
        parts.teachers.update(step)
        for role, reference in references.items():
            masters = [p for g in parts.masters if role in g.name.split("/")[0].split("+") for p in g.local()]
            for average, master in zip(reference, masters, strict=True):
                average.lerp_(master.double(), 1 - momentum)
    errors = {}
    for role, reference in references.items():
        found = parts.teachers.pieces(role)
        difference = sum(float((a.double() - b).square().sum()) for a, b in zip(found, reference, strict=True))
        errors[role] = float((difference / sum(float(b.square().sum()) for b in reference)) ** 0.5)
    return errors


def refusals(ranks: distributed.Ranks, out: Path, case: str) -> dict[str, str]:
    """Returns the lines with which unfitting checkpoints are refused."""
    lines = {}
    for name, parts, config in (
        ("model", build(case, ranks, depth=2), {"case": case}),
        ("config", build(case, ranks), {"case": "other"}),
    ):
        try:
            continuation.resume(out / case, parts, config=config)
        except CheckpointError as error:
            lines[name] = str(error)
    return lines


def full_disk(ranks: distributed.Ranks, out: Path, case: str) -> dict[str, Any]:
    """Returns what happens when the last rank's disk fills up while weights are written."""
    parts = build(case, ranks)

    def full(tensors: Any, path: Path) -> None:
        if ranks.rank == ranks.world_size - 1:
            raise OSError(28, "No space left on device", str(path))
        save_file(tensors, path)

    before = checkpoint.latest(out / case)
    continuation.save_file = full
    line = ""
    try:
        continuation.save(out / case, parts, step=STEPS, config={"case": case}, settings=KEEP_ONE)
    except CheckpointError as error:
        line = str(error)
    continuation.save_file = save_file
    names = sorted(path.name for path in (out / case / "checkpoints").iterdir())
    return {"line": line, "kept": checkpoint.latest(out / case) == before, "names": names}


def elsewhere(ranks: distributed.Ranks, run: Path, case: str, to: str, *, stop_at: int) -> dict[str, Any]:
    """Continues a run as another case, on as many ranks as there are now, saves, and compares with the undisturbed."""
    config = {"case": case}
    parts = build(to, ranks, seed=1)
    found = checkpoint.latest(run / case)
    assert found is not None
    continued = continuation.resume(run / case, parts, config=config)
    exact = same(gather_masters(parts.masters), checkpoint.load_weights(found)) and all(
        same(parts.teachers.gather(role), checkpoint.load_weights(found, role)) for role in parts.teachers
    )
    losses = list(steps(parts, continued.step, stop_at))
    if stop_at < STEPS:
        continuation.save(run / case, parts, step=stop_at, config=config, settings=KEEP_ONE)
    ended = load_file(run / f"{case}.ended")
    teachers = {role: parts.teachers.gather(role) for role in parts.teachers}
    return {
        "first": continued.step,
        "notes": continued.notes,
        "exact": exact,
        "losses": losses,
        "weights": relative(gather_masters(parts.masters), {n: v for n, v in ended.items() if "/" not in n}),
        "teachers": {
            role: relative(found, {n.partition("/")[2]: v for n, v in ended.items() if n.startswith(f"{role}/")})
            for role, found in teachers.items()
        },
    }


def main(out: Path, cases: list[str]) -> None:
    """Runs every case and writes this rank's report; ``RUN/CASE>CASE@STEP`` continues one elsewhere, up to a step."""
    torch.set_num_threads(1)
    device = distributed.prepare_environment("cpu")
    distributed.quiet_libraries()
    ranks = distributed.start(device, timeout_minutes=2)
    report: dict[str, Any] = {}
    for case in cases:
        if ">" in case:
            source, _, target = case.partition(">")
            to, _, stop_at = target.partition("@")
            run = Path(source)
            report[case] = elsewhere(ranks, run.parent, run.name, to, stop_at=int(stop_at))
        else:
            report[case] = run_case(case, ranks, out)
    if ">" not in cases[0]:
        report["refusals"] = refusals(ranks, out, cases[0])
        report["full_disk"] = full_disk(ranks, out, cases[-1])
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(report))
    distributed.leave(0, orderly=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
