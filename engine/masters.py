"""Where the float32 master weights and AdamW's moments are: one interface over DeepSpeed's ZeRO stages.

DeepSpeed keeps the weights that the optimizer updates in a different place for each stage and precision, and most
of those places are internal.  Everything here was checked against DeepSpeed 0.19.8; ``masters_of`` asserts the layout
at start-up, so that another version fails there and not silently.

======  ==========================================  ===================================================
stage   this rank's piece of a group                the whole
======  ==========================================  ===================================================
0       an equal share of the parameters end to    all shares in rank order; masters themselves are
        end, as views that fall where they fall     replicated, so sharing is for teachers' averages
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

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, beside the number of updates."""


class MasterGroup(Protocol):
    """The float32 masters of one optimizer group, and AdamW's moments of them."""

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

    def storage(self) -> list[Tensor]:
        """Returns the tensors that the optimizer itself updates, by which it knows their state."""
        ...

    def moments(self, key: str) -> list[Tensor]:
        """Returns the optimizer's state of this rank's pieces, float32 and laid out like them; aliases, too.

        Args:
            key: one of ``MOMENTS``.
        """
        ...

    def restore(self, masters: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Sets masters, moments and the module's parameters from whole tensors; every rank must call it.

        Args:
            masters: by parameter.
            moments: by moment, by parameter.
        """
        ...

    def assemble(self, pieces: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns whole parameters by name from every rank's pieces, in the pieces' dtype; at most one all-gather."""
        ...

    def split(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        """Returns this rank's pieces, float32, of whole parameters: the inverse of ``assemble``."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Replicated:
    """ZeRO 0: every rank has all masters; of the averages each keeps an equal share."""

    name: str
    names: Sequence[str]
    group: dict[str, Any]
    optimizer: torch.optim.Optimizer
    parameters: Sequence[nn.Parameter]

    def local(self) -> list[Tensor]:
        return self._share([parameter.data for parameter in self.group["params"]])

    def storage(self) -> list[Tensor]:
        return list(self.group["params"])

    def moments(self, key: str) -> list[Tensor]:
        return self._share([self.optimizer.state[parameter][key] for parameter in self.storage()])

    def restore(self, masters: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, parameter, master in zip(self.names, self.parameters, self.storage(), strict=True):
            master.data.copy_(masters[name])
            parameter.data.copy_(master.data)
            for key, whole in moments.items():
                self.optimizer.state[master][key].copy_(whole[name])

    def assemble(self, pieces: Sequence[Tensor]) -> dict[str, Tensor]:
        flat = torch.cat(list(pieces))
        if dist.get_world_size() > 1:
            padded = flat.new_zeros(self._share_size())
            padded[: len(flat)] = flat
            flat = _all_gather(padded, None).flatten()
        sizes = [parameter.numel() for parameter in self.parameters]
        parts = torch.split(flat[: sum(sizes)], sizes)
        return {
            name: part.view(like.shape) for name, part, like in zip(self.names, parts, self.parameters, strict=True)
        }

    def split(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        device = self.parameters[0].device
        return [piece.clone() for piece in self._share([whole[name].float().to(device) for name in self.names])]

    def _share_size(self) -> int:
        return -(-sum(parameter.numel() for parameter in self.parameters) // dist.get_world_size())

    def _share(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns flat views of the elements, of all tensors end to end, that are this rank's; at least one view."""
        size = self._share_size()
        first = size * dist.get_rank()
        found, offset = [], 0
        for tensor in tensors:
            start, stop = max(0, first - offset), min(tensor.numel(), first + size - offset)
            if start < stop:
                found.append(tensor.view(-1)[start:stop])
            offset += tensor.numel()
        return found or [tensors[0].view(-1)[:0]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sliced:
    """ZeRO 1 and 2: an equal slice per rank of one flat tensor."""

    name: str
    names: Sequence[str]
    optimizer: Any
    index: int
    offsets: Sequence[int]
    parameters: Sequence[nn.Parameter]

    def local(self) -> list[Tensor]:
        return [self.optimizer.single_partition_of_fp32_groups[self.index].data]

    def storage(self) -> list[Tensor]:
        return [self.optimizer.single_partition_of_fp32_groups[self.index]]

    def moments(self, key: str) -> list[Tensor]:
        return [self.optimizer.state[flat][key] for flat in self.storage()]

    def restore(self, masters: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        _write(self, masters, moments)
        whole = self.assemble([piece.to(self.parameters[0].dtype) for piece in self.local()])
        for parameter, value in zip(self.parameters, whole.values(), strict=True):
            parameter.data.copy_(value)

    def assemble(self, pieces: Sequence[Tensor]) -> dict[str, Tensor]:
        flat = _all_gather(pieces[0], self.optimizer.dp_process_group).flatten()
        return {
            name: flat[offset : offset + like.numel()].view(like.shape)
            for name, offset, like in zip(self.names, self.offsets, self.parameters, strict=True)
        }

    def split(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        mine = self.local()[0]
        group = self.optimizer.dp_process_group
        flat = torch.zeros(mine.numel() * dist.get_world_size(group), dtype=torch.float32, device=mine.device)
        for name, offset in zip(self.names, self.offsets, strict=True):
            flat[offset : offset + whole[name].numel()] = whole[name].to(flat).flatten()
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

    def storage(self) -> list[Tensor]:
        places = [self.optimizer.grad_position[self.optimizer.get_param_id(at)][0] for at in self.parameters]
        return [self.optimizer.fp32_partitioned_groups_flat[place] for place in dict.fromkeys(places)]

    def moments(self, key: str) -> list[Tensor]:
        from deepspeed.utils import safe_get_local_optimizer_state

        return [safe_get_local_optimizer_state(parameter, key).detach() for parameter in self.parameters]

    def restore(self, masters: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        _write(self, masters, moments)
        persistent = self.optimizer.persistent_parameters
        if persistent:  # small ones that stay whole on every rank: what is written to their shards would not be seen
            persistent[0].partition(persistent)
        for parameter, master in zip(self.parameters, self.local(), strict=True):
            shard = parameter.ds_tensor  # type: ignore[attr-defined]  # DeepSpeed adds it
            shard.data.copy_(master[: shard.numel()].view(shard.shape))

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
        group = self.optimizer.dp_process_group
        return [
            shard_of(whole[name], like=mine, group=group) for name, mine in zip(self.names, self.local(), strict=True)
        ]


def _write(group: MasterGroup, masters: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]) -> None:
    for pieces, whole in ((group.local(), masters), *((group.moments(key), found) for key, found in moments.items())):
        for piece, value in zip(pieces, group.split(whole), strict=True):
            piece.copy_(value)


def shard_of(whole: Tensor, *, like: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns this rank's ZeRO 3 shard of a whole parameter: flat, float32, as long as ``like``, zeros at the tail."""
    world = dist.get_world_size(group)
    padded = torch.zeros(like.numel() * world, dtype=torch.float32, device=like.device)
    padded[: whole.numel()] = whole.to(padded).flatten()
    return padded.chunk(world)[dist.get_rank(group)].clone()


@torch.no_grad()
def _all_gather(mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
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
            replicated = _Replicated(
                name=group["name"],
                names=group["names"],
                group=group,
                optimizer=engine.basic_optimizer,
                parameters=parameters,
            )
            found.append(replicated)
        elif stage in (1, 2):
            assert not getattr(optimizer, "round_robin_gradients", False), "round_robin_gradients hides the layout"
            flat = optimizer.bit16_groups_flat[index]
            offsets = [(p.data_ptr() - flat.data_ptr()) // flat.element_size() for p in parameters]
            sliced = _Sliced(
                name=group["name"],
                names=group["names"],
                optimizer=optimizer,
                index=index,
                offsets=offsets,
                parameters=parameters,
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


def gather_masters(groups: Sequence[MasterGroup], *, wanted: bool = True) -> dict[str, Tensor]:
    """Returns every trained parameter's float32 master, whole, on the CPU; every rank must call it.

    Args:
        groups: as ``masters_of`` returns them.
        wanted: whether this rank needs the result; it is empty otherwise.
    """
    whole: dict[str, Tensor] = {}
    for group in groups:
        whole |= _on_cpu(group.assemble(group.local()), wanted)
    return whole


def gather_moments(groups: Sequence[MasterGroup], *, wanted: bool = True) -> dict[str, Tensor]:
    """Returns AdamW's moments as ``<moment>/<parameter>``, whole, on the CPU; every rank must call it."""
    whole: dict[str, Tensor] = {}
    for group in groups:
        for key in MOMENTS:
            found = _on_cpu(group.assemble(group.moments(key)), wanted)
            whole |= {f"{key}/{name}": value for name, value in found.items()}
    return whole


def _on_cpu(whole: Mapping[str, Tensor], wanted: bool) -> dict[str, Tensor]:
    if not wanted:
        return {}
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in whole.items()}


@torch.no_grad()
def restore_trained(
    engine: Any,
    groups: Sequence[MasterGroup],
    masters: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    updates: int,
) -> None:
    """Sets masters, moments and the module from whole tensors, at any stage and number of ranks; every rank calls it.

    Args:
        engine: DeepSpeed's.
        groups: its masters.
        masters: by parameter, float32.
        moments: by ``<moment>/<parameter>``, float32.
        updates: AdamW's count of updates.
    """
    for group in groups:
        group.restore(masters, {key: {name: moments[f"{key}/{name}"] for name in group.names} for key in MOMENTS})
    for state in engine.basic_optimizer.state.values():
        state["step"].fill_(updates)
    _assert_layout(engine, groups, dict(engine.module.named_parameters()))


def num_updates(engine: Any) -> int:
    """Returns how many updates AdamW has made; waits for the device."""
    return int(next(iter(engine.basic_optimizer.state.values()))["step"])


def start_moments(engine: Any, groups: Sequence[MasterGroup]) -> None:
    """Makes AdamW's state where it is not there yet, and sets its counters to 0.

    torch's makes it in the first step; DeepSpeed at some stages before, by a step on zero gradients.  At ZeRO 0 in
    bf16, DeepSpeed 0.19.8 leaves the counters at 1 after that: the bias correction is then that of the second step, and
    the first update 27 % short at betas (0.9, 0.95).
    """
    optimizer = engine.basic_optimizer
    on_device = optimizer.defaults.get("fused")
    for tensor in (tensor for group in groups for tensor in group.storage()):
        state = optimizer.state[tensor]
        if not state:
            where = tensor.device if on_device else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=where)
            state.update({key: torch.zeros_like(tensor, memory_format=torch.preserve_format) for key in MOMENTS})
        state["step"].zero_()
