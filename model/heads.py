"""Projection heads with prototypes, as in DINO (arXiv 2104.14294) and iBOT (arXiv 2111.07832)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestri.model.collectives import mean_over_ranks_with_gradient


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """An MLP, an L2 norm, and prototypes of unit length."""

    hidden: int = 2048
    """Width of the MLP's hidden layers; tokens pay for it, so small recipes keep it small."""
    layers: int = 3
    """Linear layers of the MLP; 1 is a plain projection."""
    bottleneck: int = 256
    """Width of the normalised projection."""
    prototypes: int = 8192
    """Pseudo classes K."""
    standardise: bool = False
    """Whether projections get mean 0 and variance 1 over the micro-batch (all ranks) before the L2 norm: what all
    samples share then cannot hide what tells them apart."""

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "bottleneck"):
            if getattr(self, name) < 1:
                raise ValueError(f"head.{name} is {getattr(self, name)}; it must be at least 1")
        if self.prototypes < 2:
            raise ValueError(f"head.prototypes is {self.prototypes}; at least 2 are needed")


class Head(nn.Module):
    """Tokens → cosine similarity to each prototype, in [−1, 1]."""

    def __init__(self, config: HeadConfig, *, input_dim: int) -> None:
        super().__init__()
        widths = [input_dim] + [config.hidden] * (config.layers - 1) + [config.bottleneck]
        layers: list[nn.Module] = []
        for index, (wide_in, wide_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            layers += [nn.Linear(wide_in, wide_out)] + [nn.GELU()] * (index < config.layers - 1)
        self.mlp = nn.Sequential(*layers)
        self.standardise = config.standardise
        self.prototypes = nn.Parameter(torch.empty(config.prototypes, config.bottleneck))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.prototypes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns ``… prototypes`` for ``… dim``; prototypes are normalised here, so weight decay can't touch them."""
        projection = self.mlp(tokens)
        if self.standardise:
            projection = standardised(projection)
        projection = F.normalize(projection, dim=-1)
        return F.linear(projection, F.normalize(self.prototypes, dim=-1))


def standardised(values: Tensor) -> Tensor:
    """Returns ``… dim`` with mean 0 and variance 1 over everything but the last axis, on all ranks.

    Batch normalisation without affine and without running statistics: heads are not used after training.
    """
    flat = values.float().flatten(0, -2)
    centred = flat - mean_over_ranks_with_gradient(flat.mean(dim=0))
    variance = mean_over_ranks_with_gradient(centred.square().mean(dim=0))
    result: Tensor = centred * (variance + 1e-6).rsqrt()
    return result.view(values.shape).to(values.dtype)
