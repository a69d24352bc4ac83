"""Memory of batches on the CPU."""

import weakref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class BatchMemory:
    """Memory of batches, used again once nobody holds a tensor in it: the first touch of a new page costs 2 µs."""

    def __init__(self) -> None:
        """Holds no memory yet."""
        self._free: dict[tuple[int, ...], list[NDArray[np.uint8]]] = {}

    def borrow(self, shape: tuple[int, ...]) -> Tensor:
        """Returns a tensor, uint8, with anything in it."""
        free = self._free.setdefault(shape, [])
        memory = free.pop() if free else np.empty(shape, np.uint8)
        loan = memory.view()
        # Whatever shares the tensor's memory keeps the loan alive.
        weakref.finalize(loan, free.append, memory).atexit = False
        return torch.from_numpy(loan)
