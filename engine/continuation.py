"""Writing checkpoints, and continuing from one: exactly at the same number of ranks, anywhere else to rounding.

A checkpoint is written to a folder with a leading dot, synced and renamed; then ``checkpoints/latest`` is replaced.
What lies in it: engine/checkpoint.py.
"""

import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from maestri.engine import checkpoint as files
from maestri.engine.config import CheckpointConfig, changes_between
from maestri.engine.distributed import Ranks, first_failure, one_line, seed_everything, wait_for_all
from maestri.engine.errors import CheckpointDamaged, CheckpointError, NonFiniteWeights
from maestri.engine.finite import FiniteGuard
from maestri.engine.logs import Meter, merged_periods
from maestri.engine.masters import (
    MasterGroup,
    gather_masters,
    gather_moments,
    num_updates,
    restore_trained,
    shard_of,
)
from maestri.engine.teachers import Teachers
from maestri.model.method import Method
from maestri.shards.files import sync, write_atomically

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a full or failing disk raises: torch's zip writer a RuntimeError, safetensors its own."""
READ_ERRORS = (OSError, RuntimeError, SafetensorError, EOFError, KeyError, pickle.UnpicklingError)
"""What a damaged file raises when it is read."""


class Position(Protocol):
    """The part of the loader that a checkpoint needs."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Everything whose state is in a checkpoint."""

    engine: Any
    method: Method
    teachers: Teachers
    masters: Sequence[MasterGroup]
    loader: Position
    meter: Meter
    guard: FiniteGuard
    ranks: Ranks
    control: dist.ProcessGroup | None


# -------------------------------------------------------------------------------------------------------- writing


def save(run: Path, parts: Parts, *, step: int, config: Mapping[str, Any], settings: CheckpointConfig) -> Path:
    """Writes a checkpoint after ``step`` optimizer steps, and deletes old ones; every rank calls it.

    Raises:
        CheckpointError: on every rank, where any rank could not write; the checkpoints before are untouched.
        NonFiniteWeights: on every rank, where a weight is infinite or not a number.
    """
    _check_finite(parts, step)
    final = run / "checkpoints" / f"step_{step:08d}"
    draft = final.with_name(f".{final.name}.tmp")
    try:
        with _agreeing(parts, final):
            if parts.ranks.is_main:
                shutil.rmtree(draft, ignore_errors=True)
                (draft / "teachers").mkdir(parents=True)
        failure = None
        for number, (name, gather) in enumerate(_weight_files(parts).items()):
            # Every rank helps to gather each file, one of them keeps and writes it.
            writes = parts.ranks.rank == number % parts.ranks.world_size
            content = gather(writes)
            try:
                if writes and failure is None:
                    save_file(content, draft / name)
            except WRITE_ERRORS as error:
                failure = error
        with _agreeing(parts, final):
            if failure is not None:
                raise failure
            torch.save(_rank_state(parts), draft / f"rank_{parts.ranks.rank:05d}.pt")
        with _agreeing(parts, final):
            if parts.ranks.is_main:
                _write_run(draft, parts, step, config)
        with _agreeing(parts, final):
            if parts.ranks.local_rank == 0:
                _sync_tree(draft)
        with _agreeing(parts, final):
            if parts.ranks.is_main:
                shutil.rmtree(final, ignore_errors=True)
                draft.replace(final)
                write_atomically(final.parent / "latest", f"{final.name}\n".encode())
                files.prune(final.parent, keep=settings.keep, keep_every=settings.keep_every)
    except CheckpointError:
        if parts.ranks.is_main:
            shutil.rmtree(draft, ignore_errors=True)
        wait_for_all()
        raise
    return final


def _check_finite(parts: Parts, step: int) -> None:
    odd = (group.name for group in parts.masters if not all(bool(piece.isfinite().all()) for piece in group.local()))
    failure = first_failure(next(odd, ""), parts.control)
    if failure:
        raise NonFiniteWeights(step, failure)


def _weight_files(parts: Parts) -> dict[str, Callable[[bool], dict[str, Tensor]]]:
    """Returns, by file, what gathers its tensors: on every rank at once, and kept where the argument is True."""

    def student(wanted: bool) -> dict[str, Tensor]:
        return gather_masters(parts.masters, wanted=wanted) | _gather_untrained(parts.engine, wanted=wanted)

    def state(wanted: bool) -> dict[str, Tensor]:
        found = parts.method.state.state_dict() if wanted else {}
        return {name: value.cpu().contiguous() for name, value in found.items()}

    def average(role: str, wanted: bool) -> dict[str, Tensor]:
        return parts.teachers.gather(role, wanted=wanted)

    return {
        "student.safetensors": student,
        "optimizer.safetensors": lambda wanted: gather_moments(parts.masters, wanted=wanted),
        **{f"teachers/{role}.safetensors": partial(average, role) for role in parts.teachers},
        "method.safetensors": state,
    }


@contextmanager
def _agreeing(parts: Parts, final: Path) -> Iterator[None]:
    """Runs a block that writes; if it fails on any rank, raises CheckpointError on all of them."""
    failure = ""
    try:
        yield
    except WRITE_ERRORS as error:
        failure = one_line(error)
    failure = first_failure(failure, parts.control)
    if failure:
        raise CheckpointError(f"could not write checkpoint {final}: {failure}; the checkpoints before it are intact")


def _gather_untrained(engine: Any, *, wanted: bool) -> dict[str, Tensor]:
    """Returns the student's frozen parameters and its buffers on the CPU, floats as float32; every rank calls it."""
    import deepspeed

    frozen = {name: parameter for name, parameter in engine.module.named_parameters() if not parameter.requires_grad}
    partitioned = [parameter for parameter in frozen.values() if hasattr(parameter, "ds_tensor")]
    with deepspeed.zero.GatheredParameters(
        partitioned, enabled=bool(partitioned)
    ):  # only read here: changes would be lost
        found = frozen | dict(engine.module.named_buffers()) if wanted else {}
        copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in found.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in copies.items()}


def _write_run(draft: Path, parts: Parts, step: int, config: Mapping[str, Any]) -> None:
    description = {
        "format": files.FORMAT,
        "step": step,
        "updates": num_updates(parts.engine),
        "skipped": parts.guard.skipped,
        "world_size": parts.ranks.world_size,
        "loader": parts.loader.state_dict(),
        "config": config,
        "files": files.checksums(draft),
    }
    (draft / "run.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def _rank_state(parts: Parts) -> dict[str, Any]:
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "meter": parts.meter.state_dict()}
    if parts.ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(parts.ranks.device)
    return state


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


# ----------------------------------------------------------------------------------------------------- continuing


@dataclass(frozen=True, kw_only=True, slots=True)
class Continued:
    """Where a run goes on."""

    step: int
    """Optimizer steps done."""
    notes: tuple[str, ...]
    """What a user should know: damaged checkpoints passed over, settings that are others now."""


def resume(run: Path, parts: Parts, *, config: Mapping[str, Any]) -> Continued:
    """Restores everything from the run's newest checkpoint that is not damaged; every rank calls it.

    Raises:
        CheckpointError: on every rank, where the checkpoint is of another run or model, or all are damaged.
    """
    damaged: list[str] = []
    for found in files.whole_checkpoints(run):
        damage = refusal = ""
        try:
            if parts.ranks.is_main:
                _check(found, files.verify(found), parts, config)
        except CheckpointDamaged as error:
            damage = str(error)
        except CheckpointError as error:
            refusal = str(error)
        damage, refusal = first_failure(damage, parts.control), first_failure(refusal, parts.control)
        if refusal:
            raise CheckpointError(refusal)
        if damage:
            damaged.append(damage)
            continue
        continued = _restore(found, parts, config)
        notes = [f"{line}; continuing the one before it" for line in damaged]
        return Continued(step=continued.step, notes=(*notes, *continued.notes))
    raise CheckpointError(f"no checkpoint of {run} can be continued: {'; '.join(damaged) or 'there is none'}")


def _check(checkpoint: Path, description: Mapping[str, Any], parts: Parts, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a whole checkpoint belongs to another run or another model."""
    refused = changes_between(description["config"], config).refused
    if refused:
        raise CheckpointError(
            f"{checkpoint.parent.parent} holds a run with other settings: {', '.join(refused)}; "
            "choose another --out, or start over with --resume never"
        )
    saved = {name: list(value.shape) for name, value in files.load_weights(checkpoint).items()}
    module = parts.engine.module
    expected = {name: _whole_shape(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    differing = sorted(name for name in saved.keys() | expected.keys() if saved.get(name) != expected.get(name))
    if differing:
        first = differing[0]
        raise CheckpointError(
            f"checkpoint {checkpoint} is of another model: {len(differing)} parameters differ, the first is {first}: "
            f"{saved.get(first, 'absent')} in the checkpoint, {expected.get(first, 'absent')} in this run"
        )


def _whole_shape(tensor: Tensor) -> list[int]:
    return list(getattr(tensor, "ds_shape", tensor.shape))  # DeepSpeed keeps it of what it partitions


def _restore(checkpoint: Path, parts: Parts, config: Mapping[str, Any]) -> Continued:
    """Restores every part; raises CheckpointError on every rank, where any rank could not read or use a file."""
    failure = ""
    try:
        description = files.describe(checkpoint)
        student = files.load_weights(checkpoint)
        moments = load_file(checkpoint / "optimizer.safetensors")
        averages = {role: files.load_weights(checkpoint, role) for role in parts.teachers}
        method_state = files.load_state(checkpoint)
        same_ranks = description["world_size"] == parts.ranks.world_size
        to_read = [parts.ranks.rank] if same_ranks else range(description["world_size"])
        ranks = [torch.load(checkpoint / f"rank_{rank:05d}.pt", weights_only=True) for rank in to_read]
        parts.loader.load_state_dict(description["loader"])
    except CheckpointError as error:
        failure = str(error)
    except ValueError as error:
        failure = f"checkpoint {checkpoint} does not fit this run's data: {one_line(error)}"
    except READ_ERRORS as error:
        failure = f"checkpoint {checkpoint} is damaged: {one_line(error)}"
    failure = first_failure(failure, parts.control)
    if failure:
        raise CheckpointError(failure)
    restore_trained(parts.engine, parts.masters, student, moments, description["updates"])
    _restore_untrained(parts.engine, student)
    for role, average in averages.items():
        parts.teachers.restore(role, average)
    parts.method.state.load_state_dict(method_state)
    parts.guard.skipped = int(description.get("skipped", 0))
    step = int(description["step"])
    on_gpu = parts.ranks.device.type == "cuda"
    note = ""
    if same_ranks and ("cuda" in ranks[0]) == on_gpu:
        _restore_rank(ranks[0], parts)
    else:
        note = _start_rank_anew(ranks, parts, step=step, seed=int(config.get("seed", 0)))
    changed = changes_between(description["config"], config).allowed
    notes = [note] * bool(note) + ([f"changed settings: {', '.join(changed)}"] if changed else [])
    return Continued(step=step, notes=tuple(notes))


def _restore_rank(state: Mapping[str, Any], parts: Parts) -> None:
    """Restores this rank's random generators and unfinished period of metrics."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], parts.ranks.device)
    parts.meter.load_state_dict(state["meter"])


def _start_rank_anew(states: Sequence[Mapping[str, Any]], parts: Parts, *, step: int, seed: int) -> str:
    """Seeds this rank's random generators, goes on with the mean period of metrics, and returns what to tell of it.

    Args:
        states: of all ranks there were.
        parts: where they go.
        step: optimizer steps done.
        seed: the run's.
    """
    # What is drawn while training (drop-path) is each rank's own, so other ranks draw something new.
    seed_everything((seed + 1 + parts.ranks.rank) * 1_000_003 + step)
    parts.meter.load_state_dict(merged_periods([state["meter"] for state in states]))
    was = f"{len(states)} {'GPU' if 'cuda' in states[0] else 'CPU'} rank{'s' * (len(states) > 1)}"
    return f"written by {was}: data, weights and teachers go on as they were, drop-path draws anew"


@torch.no_grad()
def _restore_untrained(engine: Any, student: Mapping[str, Tensor]) -> None:
    """Sets the student's frozen parameters and its buffers, at every ZeRO stage."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_tensor"):
            parameter.partition([parameter])
            shard = parameter.ds_tensor
            value = shard_of(student[name], like=shard.flatten(), group=engine.optimizer.dp_process_group)
            shard.data.copy_(value.view(shard.shape))
        else:
            parameter.data.copy_(student[name])
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(student[name])
