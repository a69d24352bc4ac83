"""Which parameters share an optimizer group."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from maestri.model.method import Method, Teacher

WITHOUT_DECAY = ("cls_token", "pos_embed", "mask_token", "prototypes")
"""Last parts of the names of parameters that take no weight decay, whatever their shape."""


def followers(name: str, teachers: Mapping[str, Teacher]) -> tuple[str, ...]:
    """Returns the roles of the teachers that follow the student parameter ``name``, sorted."""
    return tuple(sorted(role for role, teacher in teachers.items() if name.startswith(tuple(teacher.follows))))


def takes_decay(name: str, parameter: nn.Parameter) -> bool:
    """Returns whether weight decay applies: not to biases, norms, tokens, positions and prototypes."""
    return parameter.ndim > 1 and not name.endswith(WITHOUT_DECAY)


def parameter_groups(method: Method, *, weight_decay: float) -> list[dict[str, Any]]:
    """Returns optimizer groups, each with ``name``, ``params``, ``names`` and ``weight_decay``.

    A group is a set of following teachers × whether weight decay applies, so that a flat partition of a group
    (ZeRO 1–2) is followed as a whole or not at all.  Each trained parameter is in exactly one group; names are in
    the order of ``named_parameters``, groups in the order of their first parameter.

    Raises:
        ValueError: a teacher follows no trained parameter, or a prefix of ``follows`` matches nothing.
    """
    student = method.student
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        roles = followers(name, method.teachers)
        decays = takes_decay(name, parameter)
        key = f"{'+'.join(roles) or 'unfollowed'}/{'decay' if decays else 'no_decay'}"
        decay = weight_decay if decays else 0.0
        group = groups.setdefault(key, {"name": key, "params": [], "names": [], "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    _check_follows(method, [name for group in groups.values() for name in group["names"]])
    return list(groups.values())


def _check_follows(method: Method, names: list[str]) -> None:
    for role, teacher in method.teachers.items():
        for prefix in teacher.follows:
            if not any(name.startswith(prefix) for name in names):
                raise ValueError(f"teacher '{role}' follows '{prefix}', but the student trains no such parameter")
