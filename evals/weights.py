"""Weights loaded strictly, and told apart by a digest."""

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor, nn

from maestri.engine.errors import CheckpointError


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Returns a checksum of weights: names, dtypes, shapes and values."""
    digest = xxhash.xxh3_128()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Loads weights that fit in every name and shape.

    Raises:
        CheckpointError: they do not; it counts what differs and shows the first.
    """
    expected = {name: list(value.shape) for name, value in module.state_dict().items()}
    found = {name: list(value.shape) for name, value in weights.items()}
    differing = [
        name for name in (*expected, *(found.keys() - expected.keys())) if expected.get(name) != found.get(name)
    ]
    if differing:
        first = differing[0]
        raise CheckpointError(
            f"{where} is of another model: {len(differing)} weights differ, the first is {first}: "
            f"{found.get(first, 'absent')} in the file, {expected.get(first, 'absent')} in the model"
        )
    module.load_state_dict(dict(weights))
