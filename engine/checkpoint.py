"""Checkpoints that are whole or absent, and the exact continuation from one.

``checkpoints/step_00000100/`` holds::

    run.json                    step, ranks, configuration, the loader's position
    student.safetensors         float32 masters, frozen parameters and buffers, by name; whole at every ZeRO stage
    teachers/<role>.safetensors float32 averages by name, and what else the teacher's module holds
    method.safetensors          the method's state
    rank_00000.pt …             random generators and the unfinished period of metrics, per rank
    deepspeed/                  DeepSpeed's own: student and optimizer, per rank

It is written to a folder with a leading dot, synced and renamed; then ``checkpoints/latest`` is replaced.  Our own
files are loaded without unpickling code; DeepSpeed's loader unpickles, so resume only checkpoints you trust.
"""

import json
import pickle
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from maestri.engine.config import changed_fields
from maestri.engine.distributed import Ranks, first_failure, is_lost_rank, one_line, wait_for_all
from maestri.engine.errors import CheckpointError
from maestri.engine.logs import Meter
from maestri.engine.masters import MasterGroup, gather_masters
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
    ranks: Ranks
    control: dist.ProcessGroup | None


def latest(run: Path) -> Path | None:
    """Returns a run's newest whole checkpoint, None if it has none."""
    folder = run / "checkpoints"
    pointer = folder / "latest"
    if pointer.is_file():
        named = folder / pointer.read_text(encoding="utf-8").strip()
        if named.name.startswith("step_") and (named / "run.json").is_file():
            return named
    whole = sorted(path for path in folder.glob("step_*") if (path / "run.json").is_file())
    return whole[-1] if whole else None


def load_weights(checkpoint: Path, who: str = "student") -> dict[str, Tensor]:
    """Returns float32 weights by name, of the student or of a teacher by its role, on the CPU.

    Raises:
        CheckpointError: there is no such teacher, or the file is damaged.
    """
    path = checkpoint / "student.safetensors" if who == "student" else checkpoint / "teachers" / f"{who}.safetensors"
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {checkpoint} holds no weights of '{who}'") from None
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: {path.name}: {error}") from None


def save(run: Path, parts: Parts, *, step: int, config: Mapping[str, Any], keep: int) -> Path:
    """Writes a checkpoint after ``step`` optimizer steps, and deletes all but the newest ``keep``; every rank calls it.

    Raises:
        CheckpointError: on every rank, where any rank could not write; the checkpoints before are untouched.
    """
    final = run / "checkpoints" / f"step_{step:08d}"
    draft = final.with_name(f".{final.name}.tmp")
    try:
        with _agreeing(parts, final):
            if parts.ranks.is_main:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
        student = gather_masters(parts.masters) | _gather_untrained(parts.engine)
        averages = {role: parts.teachers.gather(role) for role in parts.teachers}
        with _agreeing(parts, final):
            if parts.ranks.is_main:
                _write_weights(draft, parts, student, averages)
                _write_run(draft, parts, step, config)
            torch.save(_rank_state(parts), draft / f"rank_{parts.ranks.rank:05d}.pt")
        with _agreeing(parts, final), _deferring_errors(parts.engine) as errors:
            parts.engine.save_checkpoint(str(draft), tag="deepspeed", save_latest=False)
            if errors:
                raise errors[0]
        with _agreeing(parts, final):
            if parts.ranks.local_rank == 0:
                _sync_tree(draft)
        with _agreeing(parts, final):
            if parts.ranks.is_main:
                shutil.rmtree(final, ignore_errors=True)
                draft.replace(final)
                write_atomically(final.parent / "latest", f"{final.name}\n".encode())
                _prune(final.parent, keep)
    except CheckpointError:
        if parts.ranks.is_main:
            shutil.rmtree(draft, ignore_errors=True)
        wait_for_all()
        raise
    return final


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


@contextmanager
def _deferring_errors(engine: Any) -> Iterator[list[Exception]]:
    """Collects errors of DeepSpeed's file writes, so that a rank with a full disk still meets the others' barriers."""
    errors: list[Exception] = []
    write = engine.checkpoint_engine.save

    def guarded(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except WRITE_ERRORS as error:
            errors.append(error)

    engine.checkpoint_engine.save = guarded
    try:
        yield errors
    finally:
        engine.checkpoint_engine.save = write


def _write_weights(
    draft: Path, parts: Parts, student: dict[str, Tensor], averages: Mapping[str, dict[str, Tensor]]
) -> None:
    save_file(student, draft / "student.safetensors")
    (draft / "teachers").mkdir()
    for role, state in averages.items():
        save_file(state, draft / "teachers" / f"{role}.safetensors")
    state = {name: value.cpu().contiguous() for name, value in parts.method.state.state_dict().items()}
    save_file(state, draft / "method.safetensors")


def _gather_untrained(engine: Any) -> dict[str, Tensor]:
    """Returns the student's frozen parameters and its buffers on the CPU, floats as float32; every rank calls it."""
    import deepspeed  # type: ignore[import-untyped]

    frozen = {name: parameter for name, parameter in engine.module.named_parameters() if not parameter.requires_grad}
    partitioned = [parameter for parameter in frozen.values() if hasattr(parameter, "ds_tensor")]
    with deepspeed.zero.GatheredParameters(
        partitioned, enabled=bool(partitioned)
    ):  # only read here: changes would be lost
        found = frozen | dict(engine.module.named_buffers())
        copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in found.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in copies.items()}


def _write_run(draft: Path, parts: Parts, step: int, config: Mapping[str, Any]) -> None:
    description = {
        "format": 1,
        "step": step,
        "world_size": parts.ranks.world_size,
        "loader": parts.loader.state_dict(),
        "config": config,
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


def _prune(folder: Path, keep: int) -> None:
    for old in sorted(folder.glob("step_*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def check(checkpoint: Path, parts: Parts, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the checkpoint's ``run.json`` after checking that it belongs to this run and this model.

    Raises:
        CheckpointError: one line that names what differs.
    """
    try:
        description: dict[str, Any] = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
        old_config, world_size = description["config"], description["world_size"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: run.json: {error}") from None
    changes = changed_fields(old_config, dict(config))
    if changes:
        raise CheckpointError(
            f"{checkpoint.parent.parent} holds a run with other settings: {', '.join(changes)}; "
            "choose another --out, or start over with --resume never"
        )
    if world_size != parts.ranks.world_size:
        raise CheckpointError(
            f"checkpoint {checkpoint} was written by {world_size} ranks, this run has {parts.ranks.world_size}; "
            f"start it with {world_size}"
        )
    _check_model(checkpoint, parts)
    return description


def _check_model(checkpoint: Path, parts: Parts) -> None:
    saved = {name: list(value.shape) for name, value in load_weights(checkpoint).items()}
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


def resume(checkpoint: Path, parts: Parts, *, config: Mapping[str, Any]) -> int:
    """Restores everything and returns the number of optimizer steps done; every rank calls it.

    Raises:
        CheckpointError: on every rank, where it is of another run or model, or damaged, for any rank.
    """
    failure = ""
    try:
        description = check(checkpoint, parts, config)
        averages = {role: load_weights(checkpoint, role) for role in parts.teachers}
        method_state = load_file(checkpoint / "method.safetensors")
        state = torch.load(checkpoint / f"rank_{parts.ranks.rank:05d}.pt", weights_only=True)
        if ("cuda" in state) != (parts.ranks.device.type == "cuda"):
            where = "GPUs" if "cuda" in state else "CPUs"
            raise CheckpointError(f"checkpoint {checkpoint} was written on {where}; continue it there")
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
    try:
        parts.engine.load_checkpoint(str(checkpoint), tag="deepspeed", load_lr_scheduler_states=False)
        for role, average in averages.items():
            parts.teachers.restore(role, average)
        parts.method.state.load_state_dict(method_state)
    except READ_ERRORS as error:
        if is_lost_rank(error):
            raise
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: {one_line(error)}") from error
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if parts.ranks.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], parts.ranks.device)
    parts.meter.load_state_dict(state["meter"])
    return int(description["step"])


def discard(run: Path) -> None:
    """Deletes a run's checkpoints and rows, to start over."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    (run / "metrics.jsonl").unlink(missing_ok=True)
