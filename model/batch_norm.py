"""Batch normalisation whose batch is the micro-step of all ranks."""

import torch
from torch import Tensor, nn

from maestri.model.collectives import gather_over_ranks_with_gradient


class BatchNorm(nn.Module):
    """``view batch dim`` with mean 0 and variance 1 over the batch, each view on its own, then scaled and shifted.

    Always by the statistics of the micro-batch on all ranks: nothing here is used after training, so there are no
    running ones.  (``nn.SyncBatchNorm`` keeps them, takes all views as one batch and refuses CPUs.)  Statistics are
    float32 in any compute dtype.  Without ``affine`` nothing is scaled or shifted.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None
        self.eps = eps

    def forward(self, values: Tensor) -> Tensor:
        """Returns normalised ``view batch dim`` in the dtype of ``values``; every rank must call it."""
        wide = values.float()
        variance, mean = torch.var_mean(wide, dim=1, correction=0)
        # One collective.  Ranks hold equally many samples: the variance of all is the mean of theirs and, on top, the
        # variance of their means.
        statistics = gather_over_ranks_with_gradient(torch.stack([mean, variance])[None])
        means, variances = statistics.unbind(dim=1)
        mean = means.mean(dim=0)
        variance = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        normal = (wide - mean[:, None]) * (variance[:, None] + self.eps).rsqrt()
        if self.weight is not None and self.bias is not None:
            normal = torch.addcmul(self.bias.float(), normal, self.weight.float())
        return normal.to(values.dtype)
