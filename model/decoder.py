"""MAE's decoder: hidden tokens come back as a learnt mask token with a position."""

from dataclasses import dataclass

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from maestri.model.blocks import run_blocks
from maestri.model.encoder import sincos_positions, take


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """The decoder of MAE (arXiv 2111.06377); the defaults are its own for ViT-B."""

    dim: int = 512
    """Width of a token."""
    depth: int = 8
    """Transformer blocks."""
    heads: int = 16
    """Attention heads."""

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"decoder.{name} is {getattr(self, name)}; it must be at least 1")
        if self.dim % self.heads or self.dim % 4:
            raise ValueError(
                f"decoder.dim is {self.dim}; it must be a multiple of decoder.heads ({self.heads}) and of 4"
            )


class Decoder(nn.Module):
    """Encoded visible tokens → a prediction at every hidden position."""

    def __init__(self, config: DecoderConfig, *, input_dim: int, output_dim: int, num_tokens: int) -> None:
        super().__init__()
        self.embed = nn.Linear(input_dim, config.dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        positions = sincos_positions(config.dim, round(num_tokens**0.5))[None]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList([Block(config.dim, config.heads, qkv_bias=True) for _ in range(config.depth)])
        self.grad_checkpointing = False  # as timm's encoder calls it
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, output_dim)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Returns ``batch masked output``, in the order of ``masked``.

        Args:
            tokens: ``batch 1+visible dim``, the encoder's output.
            visible: int64 ``batch visible``.
            masked: int64 ``batch masked``.
        """
        batch = len(tokens)
        encoded = self.embed(tokens)
        positions = self.pos_embed.expand(batch, -1, -1)
        # Attention does not care for order, so hidden tokens may simply stand at the end.
        seen = encoded[:, 1:] + take(positions, visible)
        hidden = self.mask_token + take(positions, masked)
        sequence = torch.cat([encoded[:, :1], seen, hidden], dim=1)
        sequence = run_blocks(self.blocks, sequence, recompute=self.grad_checkpointing)
        return self.head(self.norm(sequence[:, -masked.shape[1] :]))  # type: ignore[no-any-return]
