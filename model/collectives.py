"""Sums over the ranks of one micro-step; on one process they are the identity."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Returns the number of ranks that share a micro-step."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Returns this process's place among them."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(value: Tensor) -> Tensor:
    """Returns the sum over all ranks; without gradient, and in place on ``value``."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def max_over_ranks(value: Tensor) -> Tensor:
    """Returns the elementwise maximum over all ranks; without gradient, and in place on ``value``."""
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def mean_over_ranks_with_gradient(value: Tensor) -> Tensor:
    """Returns the mean over all ranks; gradients flow back to every rank's ``value``.

    The engine averages gradients over ranks, so a loss of this mean, computed on every rank, has the gradient that
    one process holding all samples would have.
    """
    if world_size() == 1:
        return value
    mean: Tensor = _Mean.apply(value)
    return mean


def gather_over_ranks(value: Tensor) -> Tensor:
    """Returns every rank's equally long ``value``, one after the other along the first axis; without gradient."""
    if world_size() == 1:
        return value.detach()
    whole = value.new_empty((world_size() * len(value), *value.shape[1:]))
    dist.all_gather_into_tensor(whole, value.detach().contiguous())
    return whole


def gather_over_ranks_with_gradient(value: Tensor) -> Tensor:
    """Returns what ``gather_over_ranks`` does; gradients flow back to every rank's ``value``.

    A rank's gradient is the sum over the losses of all ranks.  The engine averages over ranks, so losses that are means
    over a rank's own samples have the gradient that one process holding all samples would have.
    """
    if world_size() == 1:
        return value
    whole: Tensor = _Gather.apply(value)
    return whole


class _Gather(torch.autograd.Function):
    """All ranks' values; of the gradient, summed over ranks, each takes its own part."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return gather_over_ranks(value)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        # gloo has no reduce-scatter
        return sum_over_ranks(gradient.clone(memory_format=torch.contiguous_format)).chunk(world_size())[rank()]


class _Mean(torch.autograd.Function):
    """The mean over ranks; so is its gradient's.  (torch's own differentiable all-reduce is deprecated.)"""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return sum_over_ranks(value.clone()) / world_size()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient.clone()) / world_size()
