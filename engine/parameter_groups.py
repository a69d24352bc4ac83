"""Which parameters share an optimizer group."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from maestri.engine.config import OptimizerConfig
from maestri.model.method import Method, Teacher

BLOCKS = "encoder.blocks."

PROTOTYPES = "prototypes"
"""Last part of the names of heads' prototypes."""
WITHOUT_DECAY = ("cls_token", "pos_embed", "mask_token", PROTOTYPES)
"""Last parts of the names of parameters that take no weight decay, whatever their shape."""


def followers(name: str, teachers: Mapping[str, Teacher]) -> tuple[str, ...]:
    """Returns the roles of the teachers that follow the student parameter ``name``, sorted."""
    return tuple(sorted(role for role, teacher in teachers.items() if name.startswith(tuple(teacher.follows))))


def takes_decay(name: str, parameter: nn.Parameter) -> bool:
    """Returns whether weight decay applies: not to biases, norms, tokens, positions and prototypes."""
    return parameter.ndim > 1 and not name.endswith(WITHOUT_DECAY)


def layer_of(name: str, depth: int) -> int:
    """Returns how deep a parameter of the student lies: 0 the encoder's patches and tokens, 1 … ``depth`` its blocks.

    The encoder's last norm and what stands behind it are at ``depth`` + 1, as in BEiT (arXiv 2106.08254).
    """
    if name.startswith(("encoder.patch_embed.", "encoder.cls_token", "encoder.pos_embed")):
        return 0
    if name.startswith(BLOCKS):
        return int(name.removeprefix(BLOCKS).split(".")[0]) + 1
    return depth + 1


def parameter_groups(method: Method, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Returns optimizer groups, each with ``name``, ``params``, ``names``, ``weight_decay`` and what schedules need.

    A group is a set of following teachers × weight decay (0 at vectors, tokens and prototypes; ``head_weight_decay``
    outside of the encoder) × a factor of the learning rate (``lr_scale``) × whether it is prototypes
    (``is_prototypes``), so that a flat partition of a group (ZeRO 1–2) is followed as a whole or not at all.  Each
    trained parameter is in exactly one group; names are in the order of ``named_parameters``, groups in the order of
    their first parameter.

    Raises:
        ValueError: a teacher follows no trained parameter, or a prefix of ``follows`` matches nothing.
    """
    student = method.student
    depth = max((layer_of(name, 0) for name, _ in student.named_parameters() if name.startswith(BLOCKS)), default=0)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        roles = followers(name, method.teachers)
        decays = takes_decay(name, parameter)
        is_prototypes = name.endswith(PROTOTYPES)
        is_head = not name.startswith("encoder.")
        scale = optimizer.layer_decay ** (depth + 1 - layer_of(name, depth))
        scale *= optimizer.head_lr_scale if is_head else 1.0
        has_own = is_head and optimizer.head_weight_decay is not None
        kind = "prototypes" if is_prototypes else "no_decay" if not decays else "head_decay" if has_own else "decay"
        key = "/".join(["+".join(roles) or "unfollowed", kind] + [f"{scale:.6g}"] * (scale != 1.0))
        decay = {"decay": optimizer.weight_decay, "head_decay": optimizer.head_weight_decay}.get(kind, 0.0)
        settings = {
            "name": key,
            "weight_decay": decay,
            "is_scheduled": kind == "decay",
            "lr_scale": scale,
            "is_prototypes": is_prototypes,
        }
        group = groups.setdefault(key, {**settings, "params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    _check_follows(method, [name for group in groups.values() for name in group["names"]])
    return list(groups.values())


def _check_follows(method: Method, names: list[str]) -> None:
    for role, teacher in method.teachers.items():
        for prefix in teacher.follows:
            if not any(name.startswith(prefix) for name in names):
                raise ValueError(f"teacher '{role}' follows '{prefix}', but the student trains no such parameter")
