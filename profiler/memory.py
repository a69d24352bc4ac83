"""Bytes by who keeps them."""

import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maestri.engine.continuation import Parts
from maestri.engine.masters import MOMENTS, MasterGroup, shape_of
from maestri.engine.spans import SpanRecorder, recording
from maestri.engine.teachers import Teachers
from maestri.model.method import Method
from maestri.pipelines.batch import Batch
from maestri.profiler.activations import saved_bytes
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


def step_bytes(
    parts: Parts, batch: Batch, step: Callable[[Iterator[Batch]], None]
) -> tuple[dict[str, int], dict[str, int]]:
    """Returns bytes by owner, gradients, activations and the batch among them, and the most by part of the step.

    Makes two steps on a batch.  Of a GPU the second is what the allocator has had at most while each part ran; on a
    CPU, whose allocator keeps no books, it is empty.
    """
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
    peaks: dict[str, int] = {}
    if parts.ranks.device.type == "cuda":
        with recording(_PeakOfParts(peaks)):
            step(repeated(batch))
    return found, peaks


def host_bytes(rank: int) -> dict[str, int]:
    """Returns the host's memory by process: this rank's, and those that it has started."""
    own = os.getpid()
    found = {f"rank {rank}": _resident(own)}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == own:
            found[f"worker {path.parent.name}"] = _resident(int(path.parent.name))
    return found


def resident_bytes() -> int:
    """Returns the host's memory that this process has now."""
    return _resident(os.getpid())


def _resident(process: int) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


class _PeakOfParts(SpanRecorder):
    """Notes the most that a GPU's allocator had in each span of a step."""

    def __init__(self, peaks: dict[str, int]) -> None:
        super().__init__(torch.device("cpu"))
        self._peaks = peaks

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Notes the most inside its block."""
        torch.cuda.reset_peak_memory_stats()
        yield
        self._peaks[name] = max(self._peaks.get(name, 0), torch.cuda.max_memory_allocated())


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
