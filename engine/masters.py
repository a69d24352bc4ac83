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

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """The module's own, in the order of ``names``."""
        ...

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the group; None means all."""
        ...

    @property
    def share_size(self) -> int:
        """Elements of a rank's share: its pieces end to end, and padding at the tail of the last ones."""
        ...

    def places(self, shares: Tensor) -> dict[str, list[Tensor]]:
        """Returns flat views of each parameter's elements, in their order, in all ranks' shares end to end."""
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

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        return None

    @property
    def share_size(self) -> int:
        return -(-sum(parameter.numel() for parameter in self.parameters) // dist.get_world_size())

    def places(self, shares: Tensor) -> dict[str, list[Tensor]]:
        sizes = [parameter.numel() for parameter in self.parameters]
        parts = torch.split(shares[: sum(sizes)], sizes)
        return {name: [part] for name, part in zip(self.names, parts, strict=True)}

    def split(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        device = self.parameters[0].device
        return [piece.clone() for piece in self._share([whole[name].float().to(device) for name in self.names])]

    def _share(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns flat views of the elements, of all tensors end to end, that are this rank's; at least one view."""
        size = self.share_size
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
        whole = assemble(self, [piece.to(self.parameters[0].dtype) for piece in self.local()])
        for parameter, value in zip(self.parameters, whole.values(), strict=True):
            parameter.data.copy_(value)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        group: dist.ProcessGroup = self.optimizer.dp_process_group
        return group

    @property
    def share_size(self) -> int:
        return self.local()[0].numel()

    def places(self, shares: Tensor) -> dict[str, list[Tensor]]:
        return {
            name: [shares[offset : offset + like.numel()]]
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
        from deepspeed.utils import safe_get_local_fp32_param

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

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        group: dist.ProcessGroup = self.optimizer.dp_process_group
        return group

    @property
    def share_size(self) -> int:
        return sum(self._piece_sizes())

    def places(self, shares: Tensor) -> dict[str, list[Tensor]]:
        by_rank = shares.view(dist.get_world_size(self.process_group), -1)
        found, offset = {}, 0
        for name, parameter, size in zip(self.names, self.parameters, self._piece_sizes(), strict=True):
            pieces, left = [], shape_of(parameter).numel()
            for share in by_rank:
                pieces.append(share[offset : offset + min(size, left)])
                left -= len(pieces[-1])
            found[name] = [piece for piece in pieces if len(piece)]
            offset += size
        return found

    def split(self, whole: Mapping[str, Tensor]) -> list[Tensor]:
        group = self.optimizer.dp_process_group
        return [
            shard_of(whole[name], like=mine, group=group) for name, mine in zip(self.names, self.local(), strict=True)
        ]

    def clear_padding(self) -> None:
        """Sets what lies behind a parameter's last element to zero; DeepSpeed leaves there what was in the memory."""
        for parameter, piece in zip(self.parameters, self.local(), strict=True):
            own = shape_of(parameter).numel() - dist.get_rank(self.process_group) * piece.numel()
            piece[max(0, own) :].zero_()

    def _piece_sizes(self) -> list[int]:
        world = dist.get_world_size(self.process_group)
        return [-(-shape_of(parameter).numel() // world) for parameter in self.parameters]


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


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Returns the shape of a whole parameter, also where ZeRO 3 has taken it apart."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def new_shares(group: MasterGroup, dtype: torch.dtype) -> Tensor:
    """Returns room for all ranks' shares of a group, end to end, on the module's device: zeros."""
    world = dist.get_world_size(group.process_group)
    return torch.zeros(world * group.share_size, dtype=dtype, device=group.parameters[0].device)


def own_pieces(group: MasterGroup, shares: Tensor, pieces: Sequence[Tensor]) -> list[Tensor]:
    """Returns views of this rank's share of ``shares``, as long as its pieces."""
    sizes = [piece.numel() for piece in pieces]
    first = group.share_size * dist.get_rank(group.process_group)
    return list(torch.split(shares[first : first + sum(sizes)], sizes))


@torch.no_grad()
def gather_shares(group: MasterGroup, shares: Tensor) -> None:
    """Fetches other ranks' shares, in place: one all-gather, none on one rank."""
    if dist.get_world_size(group.process_group) > 1:
        size = group.share_size
        first = size * dist.get_rank(group.process_group)
        dist.all_gather_into_tensor(shares, shares[first : first + size], group=group.process_group)


@torch.no_grad()
def assemble(group: MasterGroup, pieces: Sequence[Tensor]) -> dict[str, Tensor]:
    """Returns whole parameters by name from every rank's pieces, in the pieces' dtype; at most one all-gather."""
    shares = new_shares(group, pieces[0].dtype)
    torch._foreach_copy_(own_pieces(group, shares, pieces), list(pieces))
    gather_shares(group, shares)
    return {
        name: (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape_of(parameter))
        for parameter, (name, parts) in zip(group.parameters, group.places(shares).items(), strict=True)
    }


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
            sharded.clear_padding()
            found.append(sharded)
    _assert_layout(engine, found, by_name)
    return found


def _assert_layout(engine: Any, groups: Sequence[MasterGroup], by_name: Mapping[str, nn.Parameter]) -> None:
    """Asserts that assembled masters, rounded to the compute dtype, are the module's own parameters."""
    for group in groups:
        local = group.local()
        assert all(piece.dtype == torch.float32 for piece in local), f"masters of {group.name} are not float32"
        whole = assemble(group, local)
        for name, master in whole.items():
            parameter = by_name[name]
            if engine.zero_optimization_stage() == 3:
                shard = parameter.ds_tensor.flatten()  # type: ignore[attr-defined]  # DeepSpeed adds it
                piece = local[list(whole).index(name)]
                own = min(shard.numel(), max(0, master.numel() - dist.get_rank(group.process_group) * piece.numel()))
                same = torch.equal(piece[:own].to(shard.dtype), shard[:own])
                assert same, f"ZeRO 3 lays out {name} in another way"
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
        whole |= _on_cpu(assemble(group, group.local()), wanted)
    return whole


def gather_moments(groups: Sequence[MasterGroup], *, wanted: bool = True) -> dict[str, Tensor]:
    """Returns AdamW's moments as ``<moment>/<parameter>``, whole, on the CPU; every rank must call it."""
    whole: dict[str, Tensor] = {}
    for group in groups:
        for key in MOMENTS:
            found = _on_cpu(assemble(group, group.moments(key)), wanted)
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
