"""FLOPs of a piece of work, counted while it runs, forward and backward, by its parts.

A multiplication with its addition is two FLOPs.  Only matrix and matrix-vector products, convolutions and attention
count, as papers do: in a ViT-B/16 the rest is below a hundredth.  Counting looks at shapes alone, so it can run on
the ``meta`` device, where nothing is computed.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from maestri.profiler.parts import PartFollower

_aten = torch.ops.aten


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    batch, heads, length, dim = query
    return 2 * batch * heads * length * key[-2] * (dim + value[-1])


def _attention_backward(gradient: Sequence[int], *shapes: Any, **__: Any) -> int:
    return 2 * _attention(*shapes)


def _matrix_vector(matrix: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * matrix[0] * matrix[1]


FORMULAS: dict[Any, Callable[..., int]] = {
    _aten.mv: _matrix_vector,
    # Older versions of torch lack those of the CPU's attention, and would count nothing for it.
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    # torch counts the scores that a fused kernel computes again in its backward pass; what a model costs should not
    # depend on the kernel.
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    _aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}
"""What torch's counter lacks or counts otherwise, from the shapes of an operation's arguments."""


class FlopCounter(PartFollower):
    """Counts FLOPs inside its block, by part.

    A part's backward pass has a name of its own, the part's and ``BACKWARD``.
    """

    def __init__(self, parts: Mapping[str, Sequence[nn.Module]]) -> None:
        """Makes a counter.

        Args:
            parts: modules by the name of their part.
        """
        super().__init__(parts)
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._counted = 0
        self._mode = FlopCounterMode(display=False, custom_mapping=FORMULAS)

    def __enter__(self) -> Self:
        """Starts counting."""
        super().__enter__()
        self.enter_context(self._mode)
        return self

    @property
    def by_part(self) -> dict[str, int]:
        """FLOPs by part, without those that have none."""
        return {part: count for part, count in self._counts.items() if count}

    @property
    def total(self) -> int:
        """FLOPs of all parts."""
        return sum(self._counts.values())

    def settle(self, part: str) -> None:
        """Books what was counted since the last call on the part that ran."""
        counted = self._mode.get_total_flops()
        self._counts[part] += counted - self._counted
        self._counted = counted
