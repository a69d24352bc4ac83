"""Where the float32 master weights are: one interface over DeepSpeed's ZeRO stages.

DeepSpeed keeps the weights that the optimizer updates in a different place for each stage and precision, and most
of those places are internal.  Everything here was checked against DeepSpeed 0.19.8; ``masters_of`` asserts the layout
at start-up, so that another version fails there and not silently.

======  ==========================================  ===================================================
stage   this rank's piece of a group                the whole
======  ==========================================  ===================================================
0       every parameter, whole (replicated)         the same
1, 2    one equal slice of the flat group           all slices in rank order; zeros at the tail
3       ``ceil(numel / world)`` of each parameter   per parameter, all pieces in rank order; zeros at its tail
======  ==========================================  ===================================================
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


class MasterGroup(Protocol):
    """The float32 masters of one optimizer group."""

    @property
    def name(self) -> str:
        """The optimizer group's name."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Its parameters' names."""
        ...

    def local(self) -> list[Tensor]:
        """Returns this rank's pieces as float32 tensors that alias DeepSpeed's storage; fetch them anew each step."""
        ...

    def assemble(self, pieces: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns whole parameters by name from every rank's pieces, in the pieces' dtype; at most one all-gather."""
        ...

    def split(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        """Returns this rank's pieces, float32, of whole parameters: the inverse of ``assemble``."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Replicated:
    """ZeRO 0."""

    name: str
    names: Sequence[str]
    group: dict[str, Any]

    def local(self) -> list[Tensor]:
        return [parameter.data for parameter in self.group["params"]]

    def assemble(self, pieces: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names, pieces, strict=True))

    def split(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        return [
            whole[name].float().to(piece.device).clone() for name, piece in zip(self.names, self.local(), strict=True)
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sliced:
    """ZeRO 1 and 2: an equal slice per rank of one flat tensor."""

    name: str
    names: Sequence[str]
    optimizer: Any
    index: int
    offsets: Sequence[int]
    shapes: Sequence[torch.Size]

    def local(self) -> list[Tensor]:
        return [self.optimizer.single_partition_of_fp32_groups[self.index].data]

    def assemble(self, pieces: Sequence[Tensor]) -> dict[str, Tensor]:
        flat = _all_gather(pieces[0], self.optimizer.dp_process_group).flatten()
        return {
            name: flat[offset : offset + shape.numel()].view(shape)
            for name, offset, shape in zip(self.names, self.offsets, self.shapes, strict=True)
        }

    def split(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        mine = self.local()[0]
        group = self.optimizer.dp_process_group
        flat = torch.zeros(mine.numel() * dist.get_world_size(group), dtype=torch.float32, device=mine.device)
        for name, offset, shape in zip(self.names, self.offsets, self.shapes, strict=True):
            flat[offset : offset + shape.numel()] = whole[name].to(flat).flatten()
        return [flat.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sharded:
    """ZeRO 3: a shard per parameter and rank."""

    name: str
    names: Sequence[str]
    optimizer: Any
    parameters: Sequence[nn.Parameter]

    def local(self) -> list[Tensor]:
        from deepspeed.utils import safe_get_local_fp32_param  # type: ignore[import-untyped]

        return [safe_get_local_fp32_param(parameter).detach() for parameter in self.parameters]

    def assemble(self, pieces: Sequence[Tensor]) -> dict[str, Tensor]:
        gathered = _all_gather(torch.cat(list(pieces)), self.optimizer.dp_process_group)
        whole, offset = {}, 0
        for name, parameter, piece in zip(self.names, self.parameters, pieces, strict=True):
            shape = parameter.ds_shape  # type: ignore[attr-defined]  # DeepSpeed adds it
            columns = gathered[:, offset : offset + piece.numel()]
            whole[name] = columns.flatten()[: shape.numel()].view(shape)
            offset += piece.numel()
        return whole

    def split(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        rank, world = (
            dist.get_rank(self.optimizer.dp_process_group),
            dist.get_world_size(self.optimizer.dp_process_group),
        )
        pieces = []
        for name, mine in zip(self.names, self.local(), strict=True):
            padded = torch.zeros(mine.numel() * world, dtype=torch.float32, device=mine.device)
            padded[: whole[name].numel()] = whole[name].to(padded).flatten()
            pieces.append(padded.chunk(world)[rank].clone())
        return pieces


@torch.no_grad()
def _all_gather(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns ``rank element``, every rank's equally long flat tensor."""
    world = dist.get_world_size(group)
    gathered = torch.empty(world * mine.numel(), dtype=mine.dtype, device=mine.device)
    dist.all_gather_into_tensor(gathered, mine.contiguous(), group=group)
    return gathered.view(world, mine.numel())


def masters_of(engine: Any) -> list[MasterGroup]:
    """Returns the master groups of a DeepSpeed engine, in the order of its optimizer groups; every rank must call it.

    Args:
        engine: made with groups from ``parameter_groups`` (each with ``name`` and ``names``).
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    by_name = dict(engine.module.named_parameters())
    found: list[MasterGroup] = []
    for index, group in enumerate(optimizer.param_groups):
        parameters = [by_name[name] for name in group["names"]]
        if stage == 0:
            found.append(_Replicated(name=group["name"], names=group["names"], group=group))
        elif stage in (1, 2):
            assert not getattr(optimizer, "round_robin_gradients", False), "round_robin_gradients hides the layout"
            flat = optimizer.bit16_groups_flat[index]
            offsets = [(p.data_ptr() - flat.data_ptr()) // flat.element_size() for p in parameters]
            shapes = [parameter.shape for parameter in parameters]
            sliced = _Sliced(
                name=group["name"],
                names=group["names"],
                optimizer=optimizer,
                index=index,
                offsets=offsets,
                shapes=shapes,
            )
            found.append(sliced)
        else:
            sharded = _Sharded(name=group["name"], names=group["names"], optimizer=optimizer, parameters=parameters)
            found.append(sharded)
    _assert_layout(engine, found, by_name)
    return found


def _assert_layout(engine: Any, groups: Sequence[MasterGroup], by_name: Mapping[str, nn.Parameter]) -> None:
    """Asserts that assembled masters, rounded to the compute dtype, are the module's own parameters."""
    for group in groups:
        local = group.local()
        assert all(piece.dtype == torch.float32 for piece in local), f"masters of {group.name} are not float32"
        whole = group.assemble(local)
        for name, master in whole.items():
            parameter = by_name[name]
            if engine.zero_optimization_stage() == 3:
                shard = parameter.ds_tensor.flatten()  # type: ignore[attr-defined]  # DeepSpeed adds it
                piece = local[list(whole).index(name)][: shard.numel()]
                assert torch.equal(piece.to(shard.dtype), shard), f"ZeRO 3 lays out {name} in another way"
            else:
                same = master.shape == parameter.shape and torch.equal(master.to(parameter.dtype), parameter.data)
                assert same, f"ZeRO lays out {name} in another way"
        for piece, again in zip(local, group.split(whole), strict=True):
            assert torch.equal(piece, again), f"masters of {group.name} do not survive gathering and splitting"


def gather_masters(groups: Sequence[MasterGroup]) -> dict[str, Tensor]:
    """Returns every trained parameter's float32 master, whole, on the CPU; every rank must call it."""
    whole: dict[str, Tensor] = {}
    for group in groups:
        parts = group.assemble(group.local())
        whole |= {name: part.detach().to("cpu", copy=True).contiguous() for name, part in parts.items()}
    return whole
