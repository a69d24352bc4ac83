"""What a run keeps between steps on rank 0, by owner, worked out from shapes: no weight is needed.

The layouts are those of ``engine/masters.py`` and ``engine/teachers.py``.  ZeRO 1 and 2 pad an optimizer group to a
multiple of twice the ranks, ZeRO 3 each parameter to a multiple of the ranks (DeepSpeed 0.19.8).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from maestri.engine.config import OptimizerConfig
from maestri.engine.deepspeed_config import LARGEST_BUCKET
from maestri.engine.masters import MOMENTS
from maestri.engine.parameter_groups import followers, parameter_groups
from maestri.model.method import Method, Teacher

MASTER_BYTES = 4
"""Of a float32 master weight, a moment or a teacher's average."""
FLAT_ALIGNMENT = 2
"""ZeRO 1 and 2: a rank's slice of a group has a multiple of so many elements."""
PERSISTENT_ELEMENTS = 100_000
"""ZeRO 3: parameters no larger stay whole on every rank, beside their shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a model is spread out."""

    stage: int
    """ZeRO's, 0 to 3."""
    world_size: int
    """Ranks."""
    itemsize: int
    """Bytes of a parameter in the compute dtype."""
    offloads: bool = False
    """Whether what the optimizer updates lies in the host's memory."""
    on_gpu: bool = True
    """Whether that is another memory than the model's."""
    accumulates: bool = False
    """Whether a step has several micro-batches."""

    @property
    def is_wide(self) -> bool:
        """Whether the compute dtype is the masters' own."""
        return self.itemsize == MASTER_BYTES

    def share(self, sizes: Sequence[int]) -> int:
        """Returns the elements of a rank's share of a group of parameters, padding among them."""
        if self.stage == 3:
            return sum(-(-size // self.world_size) for size in sizes)
        if self.stage == 0:
            return -(-sum(sizes) // self.world_size)
        multiple = FLAT_ALIGNMENT * self.world_size
        return -(-sum(sizes) // multiple) * multiple // self.world_size


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptBytes:
    """Bytes that rank 0 keeps between steps."""

    device: dict[str, int]
    """By owner, as ``memory.bytes_by_owner`` names them."""
    host: dict[str, int] = field(default_factory=dict)
    """By owner, what is offloaded."""
    gradients: int = 0
    """On the device, waiting for the optimizer's step; ZeRO 3 sets them aside for good."""
    accumulated: int = 0
    """Of them, there from one micro-batch to the next."""
    bucket: int = 0
    """In which gradients are reduced; ZeRO 3 has it always, ZeRO 1 and 2 from the forward pass on."""
    widened: int = 0
    """In the optimizer's step: gradients in float32, at ZeRO 0 of all parameters, else of the group being updated."""


def kept_bytes(method: Method, optimizer: OptimizerConfig, layout: Layout) -> KeptBytes:
    """Returns what a run keeps; ``method`` is in its compute dtype."""
    groups = parameter_groups(method, optimizer)
    sizes = [[parameter.numel() for parameter in group["params"]] for group in groups]
    shares = [layout.share(of_group) for of_group in sizes]
    trained, share = sum(map(sum, sizes)), sum(shares)
    masters = MASTER_BYTES * (trained if layout.stage == 0 else share)
    found = {
        "parameters": _parameter_bytes(method.student, groups, shares, layout),
        "masters": 0 if layout.stage == 0 and layout.is_wide else masters,
        "moments": len(MOMENTS) * masters,
        **{f"module of {role}": _module_bytes(role, method, groups, layout) for role in method.teachers},
        **{f"average of {role}": _average_bytes(role, method.teachers, groups, layout) for role in method.teachers},
        "state": _bytes_of((*method.state.parameters(), *method.state.buffers())),
    }
    gradients = layout.itemsize * (trained if layout.stage == 0 else share)
    if layout.offloads:
        found["offloaded gradients"] = MASTER_BYTES * share
        gradients = gradients if layout.stage == 3 and not layout.on_gpu else 0
    largest = 0 if layout.offloads else MASTER_BYTES * max(shares)
    zero_0 = 0 if layout.is_wide else MASTER_BYTES * trained
    return KeptBytes(
        device={owner: size for owner, size in found.items() if not _is_offloaded(owner, layout)},
        host={owner: size for owner, size in found.items() if _is_offloaded(owner, layout)},
        gradients=gradients,
        accumulated=_accumulated_bytes(trained, gradients, layout),
        bucket=layout.itemsize * min(LARGEST_BUCKET, trained) if layout.stage else 0,
        widened=largest if layout.stage else zero_0,
    )


def _is_offloaded(owner: str, layout: Layout) -> bool:
    """Returns whether an owner's bytes lie in another memory than the model's."""
    lies_apart = ("masters", "moments", "average of", "offloaded gradients")
    return layout.offloads and layout.on_gpu and owner.startswith(lies_apart)


def _accumulated_bytes(trained: int, gradients: int, layout: Layout) -> int:
    """Returns bytes of gradients from one micro-batch to the next; up to ZeRO 1 every rank has those of all."""
    if not layout.accumulates:
        return 0
    return layout.itemsize * trained if layout.stage <= 1 else gradients


def _parameter_bytes(
    student: nn.Module, groups: Sequence[Mapping[str, Any]], shares: Sequence[int], layout: Layout
) -> int:
    if layout.stage == 0:
        return _bytes_of((*student.parameters(), *student.buffers()))
    buffers = _bytes_of(student.buffers())
    sizes = [parameter.numel() for parameter in student.parameters()]
    if layout.stage == 3:
        shards = layout.share(sizes)
        whole = sum(size for size in sizes if size <= PERSISTENT_ELEMENTS) if layout.world_size > 1 else 0
        return layout.itemsize * (shards + whole) + buffers
    frozen: int = sum(sizes) - sum(parameter.numel() for group in groups for parameter in group["params"])
    return layout.itemsize * (layout.world_size * sum(shares) + frozen) + buffers


def _module_bytes(role: str, method: Method, groups: Sequence[Mapping[str, Any]], layout: Layout) -> int:
    """Returns bytes of a teacher's module: what it follows lies in one piece for all ranks' shares, where it can."""
    module = method.teachers[role].module
    found = _bytes_of((*module.parameters(), *module.buffers()))
    for group in _followed(role, method.teachers, groups):
        sizes = [parameter.numel() for parameter in group["params"]]
        if _lies_in_one_piece(sizes, layout):
            found += layout.itemsize * (layout.world_size * layout.share(sizes) - sum(sizes))
    return found


def _average_bytes(
    role: str, teachers: Mapping[str, Teacher], groups: Sequence[Mapping[str, Any]], layout: Layout
) -> int:
    """Returns bytes of a teacher's average beside its module; in float32 they are the same, where they lie together."""
    found = 0
    is_apart = layout.offloads and layout.on_gpu
    for group in _followed(role, teachers, groups):
        sizes = [parameter.numel() for parameter in group["params"]]
        if not (layout.is_wide and _lies_in_one_piece(sizes, layout) and not is_apart):
            found += MASTER_BYTES * layout.share(sizes)
    return found


def _lies_in_one_piece(sizes: Sequence[int], layout: Layout) -> bool:
    """Returns whether each parameter is one stretch of all ranks' shares end to end."""
    return layout.stage != 3 or all(-(-size // layout.world_size) >= size for size in sizes)


def _followed(
    role: str, teachers: Mapping[str, Teacher], groups: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    return [group for group in groups if role in followers(group["names"][0], teachers)]


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
