"""What the forward pass keeps for the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Kept:
    """Bytes that autograd saved inside a block of ``saved_bytes``."""

    def __init__(self) -> None:
        self.bytes = 0
        """Of storages that were saved, each counted once, without those that ``known`` holds."""


@contextmanager
def saved_bytes(known: frozenset[int]) -> Iterator[Kept]:
    """Yields what counts the activations that are saved for backward inside the block.

    Args:
        known: addresses of storages that are there anyway: parameters, the batch.
    """
    kept, seen = Kept(), set(known)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.bytes += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
