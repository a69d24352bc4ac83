"""Running a stack of transformer blocks."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_blocks(blocks: Iterable[nn.Module], tokens: Tensor, *, recompute: bool) -> Tensor:
    """Returns ``batch token dim`` after all blocks.

    Args:
        blocks: each takes and returns ``batch token dim``.
        tokens: ``batch token dim``.
        recompute: whether the backward pass runs blocks again, each from its own input, instead of keeping what they
            computed (activation checkpointing).
    """
    for block in blocks:
        tokens = (
            checkpoint(block, tokens, use_reentrant=False) if recompute and torch.is_grad_enabled() else block(tokens)
        )
    return tokens
