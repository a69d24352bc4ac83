"""Teachers: float32 averages of the student's float32 masters, exact at every ZeRO stage.

The average is kept in pieces: each rank averages its share of the masters, 1/N of them on N ranks, and one all-gather
per teacher and group, in the compute dtype, refreshes the teacher's module.  In bf16 an average with m near 1 stops
moving, because relative updates under 2⁻⁸ are lost; a float32 one of the float32 masters does not.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from maestri.engine.masters import MasterGroup
from maestri.engine.parameter_groups import followers
from maestri.model.method import Method, Teacher


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


class Teachers:
    """The averages of all teachers and the only place that writes to their modules."""

    def __init__(self, method: Method, student: nn.Module, groups: Sequence[MasterGroup]) -> None:
        """Seeds each average with the masters themselves (not with the module, which may be rounded).

        Args:
            student: as DeepSpeed holds it (``engine.module``).
        """
        self._teachers = method.teachers
        self._student = student
        self._groups = {
            role: [g for g in groups if role in followers(g.names[0], method.teachers)] for role in method.teachers
        }
        self._averages = {
            role: [[piece.clone() for piece in group.local()] for group in groups]
            for role, groups in self._groups.items()
        }
        for role in method.teachers:
            self._refresh(role)

    def __iter__(self) -> Iterator[str]:
        """Yields the teachers' roles."""
        return iter(self._teachers)

    def pieces(self, role: str) -> list[Tensor]:
        """Returns this rank's share of a teacher's average, float32."""
        return [piece for averages in self._averages[role] for piece in averages]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves every teacher that is due at this 0-based optimizer step; call it only after an applied step."""
        for role, teacher in self._teachers.items():
            if (step + 1) % teacher.every:
                continue
            weight = 1.0 - teacher.momentum(step)
            for group, averages in zip(self._groups[role], self._averages[role], strict=True):
                torch._foreach_lerp_(averages, group.local(), weight)
            self._refresh(role)

    @torch.no_grad()
    def _refresh(self, role: str) -> None:
        """Writes the averages, rounded to the compute dtype, and copied buffers into the teacher's module."""
        teacher = self._teachers[role]
        parameters = dict(teacher.module.named_parameters())
        dtype = next(iter(parameters.values())).dtype
        for group, averages in zip(self._groups[role], self._averages[role], strict=True):
            whole = group.assemble([piece.to(dtype) for piece in averages])
            torch._foreach_copy_([parameters[name].data for name in whole], list(whole.values()))
        if teacher.buffers == "copy":
            self._copy_buffers(teacher)

    def _copy_buffers(self, teacher: Teacher) -> None:
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
        for group, averages in zip(self._groups[role], self._averages[role], strict=True):
            whole = group.assemble(averages)
            if wanted:
                state |= {name: value.to("cpu", copy=True).contiguous() for name, value in whole.items()}
        return state if wanted else {}

    @torch.no_grad()
    def restore(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Sets a teacher from ``gather``'s result, at any ZeRO stage and number of ranks."""
        self._teachers[role].module.load_state_dict(dict(state))
        for index, group in enumerate(self._groups[role]):
            self._averages[role][index] = group.split(state)
        self._refresh(role)
