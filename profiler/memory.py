"""Bytes by who keeps them."""

import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maestri.engine.continuation import Parts
from maestri.engine.distributed import Ranks
from maestri.engine.masters import MOMENTS, MasterGroup, shape_of
from maestri.engine.teachers import Teachers
from maestri.model.method import Method
from maestri.pipelines.batch import Batch
from maestri.profiler.activations import saved_bytes
from maestri.profiler.findings import Moment
from maestri.profiler.memory_curve import memory_curve
from maestri.profiler.parts import parts_of
from maestri.profiler.resident import repeated


def bytes_by_owner(
    student: nn.Module, method: Method, teachers: Teachers, masters: Sequence[MasterGroup]
) -> dict[str, int]:
    """Returns what a run keeps between steps on this rank, in bytes, by owner.

    A storage counts once, whole, for the first owner: in fp32 without ZeRO the masters are the parameters themselves.
    Gradients and what DeepSpeed sets aside for its collectives come on top.

    Args:
        student: as DeepSpeed holds it (``engine.module``).
        method: whose it is.
        teachers: their averages.
        masters: of the student.
    """
    seen: set[int] = set()

    def count(tensors: Iterable[Tensor]) -> int:
        found = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found += storage.nbytes()
        return found

    roles = method.teachers
    return {
        "parameters": count(_with_shards(student)),
        "masters": count(piece.data for group in masters for piece in group.storage()),
        "moments": count(piece for group in masters for key in MOMENTS for piece in group.moments(key)),
        **{f"module of {role}": count(_with_shards(teacher.module)) for role, teacher in roles.items()},
        **{f"average of {role}": count(teachers.pieces(role)) for role in roles},
        "state": count(_with_shards(method.state)),
    }


def step_bytes(parts: Parts, batch: Batch, step: Callable[[Iterator[Batch]], None]) -> dict[str, int]:
    """Returns bytes by owner, gradients, activations and the batch among them; makes a step on a batch."""
    student = parts.engine.module
    found = bytes_by_owner(student, parts.method, parts.teachers, parts.masters)
    kept = [*_with_shards(student), *batch.views.values()]
    known = frozenset(tensor.untyped_storage().data_ptr() for tensor in kept)
    with saved_bytes(known) as saved:
        step(repeated(batch))
    itemsize = next(iter(parts.engine.module.parameters())).element_size()
    whole = sum(shape_of(parameter).numel() for group in parts.masters for parameter in group.parameters)
    own = sum(group.share_size for group in parts.masters)
    kept_gradients = own if parts.engine.zero_optimization_stage() >= 2 else whole
    found |= {"gradients": kept_gradients * itemsize, "activations": saved.bytes}
    found["batch"] = sum(tensor.nbytes for tensor in batch.views.values())
    return found


def step_curve(parts: Parts, batch: Batch, owners: Mapping[str, int], step: Callable[[], None]) -> list[Moment]:
    """Returns the memory over a step.

    Args:
        parts: the run's.
        batch: the step's.
        owners: of ``step_bytes``: on a CPU, whose allocator keeps no books, what they keep is where the curve begins.
        step: makes the step.
    """
    device = parts.ranks.device
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
    else:
        held = sum(kept for name, kept in owners.items() if name not in ("gradients", "activations"))
    return memory_curve(parts_of(parts.method), device, held, step)


def host_bytes(ranks: Ranks) -> dict[str, int]:
    """Returns the host's memory by process, this rank's and those that it has started, and what of it is pinned."""
    own = os.getpid()
    found = {f"rank {ranks.rank}": _resident(own)}
    if ranks.device.type == "cuda":
        found["pinned"] = int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == own:
            found[f"worker {path.parent.name}"] = _resident(int(path.parent.name))
    return found


def outside_bytes(device: torch.device) -> int:
    """Returns what a GPU has given to others than torch's allocator: DALI's pool, contexts, other processes."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free - torch.cuda.memory_reserved(device))


def resident_bytes() -> int:
    """Returns the host's memory that this process has now."""
    return _resident(os.getpid())


def _resident(process: int) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """Returns the most memory that this process has had resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _with_shards(module: nn.Module) -> Iterator[Tensor]:
    """Yields parameters and buffers, and at ZeRO 3 this rank's shard of each parameter."""
    own: Any
    for own in (*module.parameters(), *module.buffers()):
        yield own.data
        if hasattr(own, "ds_tensor"):
            yield own.ds_tensor.data
