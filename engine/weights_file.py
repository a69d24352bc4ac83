"""Files of weights from elsewhere: read without running their code, and fitted to an encoder."""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from maestri.engine.errors import CheckpointError
from maestri.model.encoder import Encoder

WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
"""Keys under which training programs put weights, inside of one another at times."""
PREFIXES = (
    "",
    "module.",
    "backbone.",
    "encoder.",
    "model.",
    "base_encoder.",
    "module.backbone.",
    "module.base_encoder.",
)
"""What stands before an encoder's names in published files (timm, MAE, DINO, iBOT, MoCo-v3)."""


def read_weights(path: Path, *, model: str = "") -> dict[str, Tensor]:
    """Returns weights by name from a ``.safetensors`` file or one of ``torch.save``, on the CPU.

    Args:
        path: the file.
        model: which, where a file holds several networks by name (DINO: ``teacher``, ``student``).

    Raises:
        CheckpointError: the file is missing, damaged, holds no weights, or holds several and ``model`` names none.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE's and DINO's settings; it runs nothing
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} is damaged, or holds more than weights; save model.state_dict() alone") from None
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    if isinstance(content, dict) and isinstance(content.get(model), dict):
        content = content[model]
    while isinstance(content, dict) and any(isinstance(content.get(key), dict) for key in WRAPPERS):
        content = next(content[key] for key in WRAPPERS if isinstance(content.get(key), dict))
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)} if _by_name(content) else {}
    if not tensors:
        inside = [key for key, value in content.items() if isinstance(value, dict)] if _by_name(content) else []
        hint = f"; it holds {', '.join(inside)}: name one" if inside else ""
        raise CheckpointError(f"{path} holds no weights by name{hint}")
    return tensors


def _by_name(content: object) -> bool:
    return isinstance(content, dict) and all(isinstance(name, str) for name in content)


def load_encoder(encoder: Encoder, weights: Mapping[str, Tensor], *, where: str) -> str:
    """Loads published weights into an encoder; returns a sentence on what was taken, resampled and left out.

    Positions of another grid are resampled as timm does (bicubic, antialiased).

    Raises:
        CheckpointError: a weight of the encoder is missing or has another shape.
    """
    from timm.layers.pos_embed import resample_abs_pos_embed

    own = encoder.state_dict()
    prefix = max(PREFIXES, key=lambda text: sum(f"{text}{name}" in weights for name in own))
    found = {name: weights[f"{prefix}{name}"] for name in own if f"{prefix}{name}" in weights}
    notes = []
    positions = found.get("pos_embed")
    if positions is not None and positions.ndim == 3 and positions.shape[1] != own["pos_embed"].shape[1]:
        old, new = round((positions.shape[1] - 1) ** 0.5), round(encoder.num_tokens**0.5)
        if old * old == positions.shape[1] - 1:
            found["pos_embed"] = resample_abs_pos_embed(positions.float(), [new, new])
            notes.append(f"positions resampled from {old} × {old} to {new} × {new}")
    for name, value in own.items():
        there = list(found[name].shape) if name in found else "absent"
        if there != list(value.shape):
            raise CheckpointError(
                f"{where} does not fit the encoder: {name} is {there} there and {list(value.shape)} here"
            )
    encoder.load_state_dict({name: value.float() for name, value in found.items()})
    taken = {f"{prefix}{name}" for name in found}
    others: dict[str, int] = {}
    for name in weights.keys() - taken:
        others.setdefault(name.removeprefix(prefix).split(".")[0], 0)
        others[name.removeprefix(prefix).split(".")[0]] += 1
    if others:
        notes.append("left out: " + ", ".join(f"{name} ({count})" for name, count in sorted(others.items())))
    return f"starting from {where}: {len(found)} tensors of the encoder" + "".join(f"; {note}" for note in notes)
