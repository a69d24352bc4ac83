"""Teachers: float32 averages of the student's float32 masters, exact at every ZeRO stage.

The average is kept in pieces: each rank averages its share of the masters, 1/N of them on N ranks, and one all-gather
per teacher and group, in the compute dtype, refreshes the teacher's module.  In bf16 an average with m near 1 stops
moving, because relative updates under 2⁻⁸ are lost; a float32 one of the float32 masters does not.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from maestri.engine.masters import MasterGroup, assemble, gather_shares, new_shares, own_pieces
from maestri.engine.parameter_groups import followers
from maestri.model.method import Method, Teacher

_CACHED = 1 << 18
"""Elements averaged at a time on a CPU: 1 MB each of average and masters."""


def prepare_teachers(method: Method, *, device: torch.device, dtype: torch.dtype) -> None:
    """Moves teachers to the device and compute dtype, copies the student's weights into them and freezes them.

    Call it before ``deepspeed.initialize``, which may partition the student's parameters (ZeRO 3); parameters that
    never train get their only copy here.
    """
    student = method.student.state_dict()
    for teacher in method.teachers.values():
        own = teacher.module.state_dict()
        followed = {name: value for name, value in student.items() if name.startswith(tuple(teacher.follows))}
        missing = sorted(followed.keys() - own.keys())
        assert not missing, f"a teacher's module lacks {missing[0]}, which it follows"
        teacher.module.load_state_dict(own | followed)
        teacher.module.requires_grad_(False).to(device=device, dtype=dtype)
        teacher.module.train(teacher.train_mode)


class Average:
    """A teacher's average of one master group, and the parameters of its module that are refreshed from it."""

    def __init__(self, group: MasterGroup, module: nn.Module) -> None:
        """Seeds the average with the masters themselves (not with the module, which may be rounded)."""
        self.group = group
        own = dict(module.named_parameters())
        self._parameters = {name: own[name] for name in group.names}
        self._dtype = own[group.names[0]].dtype
        masters, shares = group.local(), new_shares(group, self._dtype)
        # Parameters are views of what the all-gather fills, so that nothing is copied and no memory is fresh: on a CPU
        # its pages cost several times the averaging.  ZeRO 3 takes them apart over ranks, and they can't be.
        places = group.places(shares)
        self._shares = shares if all(len(parts) == 1 for parts in places.values()) else None
        self._places: list[Tensor] = []
        if self._shares is not None:
            for name, (part,) in places.items():
                own[name].data = part.view(own[name].shape)
            self._places = own_pieces(group, self._shares, masters)
        # In float32, this rank's share of the module is the average.
        self._is_module = bool(self._places) and self._dtype == torch.float32 and shares.device == masters[0].device
        self.pieces = self._places if self._is_module else [piece.clone() for piece in masters]
        """This rank's share, float32."""
        self._cut_pieces, self._cut_places = _cut(self.pieces), _cut(self._places)
        self.set(masters)

    def set(self, pieces: Sequence[Tensor]) -> None:
        """Makes ``pieces`` this rank's share, and refreshes the module; every rank must call it."""
        torch._foreach_copy_(self.pieces, list(pieces))
        self.refresh()

    def move(self, weight: float) -> None:
        """Moves the average to the masters by ``weight``, and refreshes the module; every rank must call it."""
        masters = self.group.local()
        if self._is_module or not self._places or self._places[0].device.type != "cpu":
            torch._foreach_lerp_(self.pieces, masters, weight)
            self.refresh()
            return
        # Piece by piece, so that what is rounded still lies in the cache.
        for average, master, place in zip(self._cut_pieces, _cut(masters), self._cut_places, strict=True):
            average.lerp_(master, weight)
            place.copy_(average)
        assert self._shares is not None
        gather_shares(self.group, self._shares)

    def refresh(self) -> None:
        """Writes the average, rounded to the compute dtype, into the module; every rank must call it."""
        shares = new_shares(self.group, self._dtype) if self._shares is None else self._shares
        places = self._places or own_pieces(self.group, shares, self.pieces)
        if not self._is_module:
            torch._foreach_copy_(places, self.pieces)
        gather_shares(self.group, shares)
        if self._shares is None:
            to: list[Tensor] = []
            parts = self.group.places(shares)
            for name, parameter in self._parameters.items():
                to += torch.split(parameter.data.view(-1), [len(part) for part in parts[name]])
            torch._foreach_copy_(to, [part for name in self._parameters for part in parts[name]])


def _cut(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns views of flat tensors, none longer than ``_CACHED``."""
    return [part for whole in tensors for part in ((whole,) if len(whole) <= _CACHED else torch.split(whole, _CACHED))]


class Teachers:
    """The averages of all teachers and the only place that writes to their modules."""

    def __init__(self, method: Method, student: nn.Module, groups: Sequence[MasterGroup]) -> None:
        """Seeds each average with the masters.

        Args:
            student: as DeepSpeed holds it (``engine.module``).
        """
        self._teachers = method.teachers
        self._student = student
        self._averages = {
            role: [Average(g, teacher.module) for g in groups if role in followers(g.names[0], method.teachers)]
            for role, teacher in method.teachers.items()
        }
        for teacher in self._teachers.values():
            self._copy_buffers(teacher)

    def __iter__(self) -> Iterator[str]:
        """Yields the teachers' roles."""
        return iter(self._teachers)

    def pieces(self, role: str) -> list[Tensor]:
        """Returns this rank's share of a teacher's average, float32."""
        return [piece for average in self._averages[role] for piece in average.pieces]

    def averages(self, role: str) -> Sequence[Average]:
        """Returns a teacher's averages, one an optimizer group."""
        return self._averages[role]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves every teacher that is due at this 0-based optimizer step; call it only after an applied step."""
        for role, teacher in self._teachers.items():
            if (step + 1) % teacher.every:
                continue
            weight = 1.0 - teacher.momentum(step)
            for average in self._averages[role]:
                average.move(weight)
            self._copy_buffers(teacher)

    @torch.no_grad()
    def _copy_buffers(self, teacher: Teacher) -> None:
        if teacher.buffers != "copy":
            return
        own = dict(teacher.module.named_buffers())
        for name, value in self._student.named_buffers():
            if name.startswith(tuple(teacher.follows)):
                own[name].copy_(value)

    @torch.no_grad()
    def gather(self, role: str, *, wanted: bool = True) -> dict[str, Tensor]:
        """Returns a teacher whole, by name, on the CPU; every rank must call it.

        Float32 averages, and what the teacher holds besides (frozen parameters, buffers) as it is.

        Args:
            role: the teacher's.
            wanted: whether this rank needs the result; it is empty otherwise.
        """
        state = {
            name: value.detach().to("cpu", copy=True)
            for name, value in self._teachers[role].module.state_dict().items()
        }
        for average in self._averages[role]:
            whole = assemble(average.group, average.pieces)
            if wanted:
                state |= {name: value.to("cpu", copy=True).contiguous() for name, value in whole.items()}
        return state if wanted else {}

    @torch.no_grad()
    def restore(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Sets a teacher from ``gather``'s result, at any ZeRO stage and number of ranks."""
        self._teachers[role].module.load_state_dict(dict(state))
        for average in self._averages[role]:
            average.set(average.group.split(state))
        self._copy_buffers(self._teachers[role])
