"""The encoder: timm's vision transformer, run on the visible tokens alone."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maestri.model.blocks import run_blocks

PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """A ViT; the defaults are ViT-B/16."""

    patch: int = 16
    """Side of a patch in pixels; must divide ``views.size``."""
    dim: int = 768
    """Width of a token; a multiple of ``heads`` and of 4."""
    depth: int = 12
    """Transformer blocks."""
    heads: int = 12
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Width of a block's MLP as a multiple of ``dim``."""
    position: Literal["sincos", "learned"] = "sincos"
    """Fixed two-dimensional sine-cosine positions (MAE), or learned ones."""
    drop_path: float = 0.0
    """Largest rate of stochastic depth, 0–1, rising linearly with depth; student only."""

    def __post_init__(self) -> None:
        for name in ("patch", "dim", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"encoder.{name} is {getattr(self, name)}; it must be at least 1")
        if self.dim % self.heads or self.dim % 4:
            raise ValueError(
                f"encoder.dim is {self.dim}; it must be a multiple of encoder.heads ({self.heads}) and of 4"
            )
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"encoder.drop_path is {self.drop_path}; it must lie in [0, 1)")


@lru_cache
def _affine(device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift, float32 ``3``, that take 0–255 pixels to normalised ones."""
    mean = torch.tensor(PIXEL_MEAN, device=device)
    std = torch.tensor(PIXEL_STD, device=device)
    return 1.0 / (255.0 * std), -mean / std


def normalise(pixels: Tensor, *, dim: int) -> Tensor:
    """Returns float32 pixels of mean 0 and deviation 1 over ImageNet; ``dim`` is the axis of the three channels.

    The constants are kept outside the module, because DeepSpeed casts a module's buffers to the compute dtype.
    """
    scale, shift = _affine(pixels.device)
    shape = [1] * pixels.ndim
    shape[dim] = 3
    return torch.addcmul(shift.view(shape), pixels.float(), scale.view(shape))


class PatchProjection(nn.Conv2d):
    """A ViT's patch convolution, by its parameters and their names, for patches that are cut already.

    Where the stride is the kernel's size it is one matrix product, and computed as such.  A convolution of patches
    stacked as a narrow image is slower and, in bf16 on Intel processors with AMX (PyTorch 2.15), wrong, with NaN among
    its values (benchmarks/patch_embedding.py).
    """

    @classmethod
    def of(cls, convolution: nn.Conv2d) -> "PatchProjection":
        """Returns one with the parameters of ``convolution`` themselves; draws nothing."""
        patch = convolution.kernel_size[0]
        own = cls(convolution.in_channels, convolution.out_channels, patch, stride=patch, device="meta")
        own.weight, own.bias = convolution.weight, convolution.bias
        return own

    def forward(self, patches: Tensor) -> Tensor:
        """Returns ``batch token dim`` of ``batch token channel patch patch``."""
        return F.linear(patches.flatten(2), self.weight.flatten(1), self.bias)


def to_patches(images: Tensor, patch: int) -> Tensor:
    """Returns the patches of ``batch 3 height width`` as ``batch token 3 patch patch``, row-major, same dtype."""
    batch, channels, height, width = images.shape
    grid = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Returns ``tokens[b, index[b, i]]``: ``batch token …`` and int64 ``batch i`` → ``batch i …``."""
    shape = index.shape + (1,) * (tokens.ndim - 2)
    return torch.take_along_dim(tokens, index.view(shape), dim=1)


def sincos_positions(dim: int, side: int) -> Tensor:
    """Returns MAE's fixed positions, float32 ``side·side dim``: half of the width for x, half for y."""
    quarter = dim // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    grid = torch.arange(side, dtype=torch.float64)
    rows, columns = torch.meshgrid(grid, grid, indexing="ij")
    parts = []
    for axis in (columns, rows):
        angle = axis.flatten()[:, None] * omega[None]
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).float()


class Encoder(VisionTransformer):
    """timm's ``VisionTransformer`` with timm's parameter names, whose forward can leave out hidden tokens.

    MAE (arXiv 2111.06377) encodes visible patches only; the pixels of hidden ones are never even normalised.
    """

    def __init__(self, config: EncoderConfig, *, image_size: int) -> None:
        super().__init__(
            img_size=image_size,
            patch_size=config.patch,
            embed_dim=config.dim,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            drop_path_rate=config.drop_path,
            num_classes=0,
            global_pool="token",
        )
        self.patch = config.patch
        self.num_tokens = (image_size // config.patch) ** 2
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        proj = PatchProjection.of(self.patch_embed.proj)
        nn.init.xavier_uniform_(proj.weight.data.view(proj.weight.shape[0], -1))
        self.patch_embed.proj = proj
        nn.init.normal_(self._token("cls_token"), std=0.02)
        if config.position == "sincos":
            positions = self._token("pos_embed")
            positions.data.zero_()
            positions.data[0, 1:] = sincos_positions(config.dim, image_size // config.patch)
            positions.requires_grad_(False)

    def forward(  # type: ignore[override]  # timm masks attention here; we leave tokens out
        self,
        images: Tensor,
        visible: Tensor | None = None,
        *,
        replaced: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """Returns ``batch 1+visible dim`` after the last norm, the class token first.

        Args:
            images: uint8 ``batch 3 height width``, 0–255, square; of another size than the encoder's own (local views),
                positions are resampled.
            visible: int64 ``batch visible``, the tokens to encode; all of them when None.
            replaced: bool ``batch visible``, tokens that become ``mask_token`` and then get their positions (iBOT).
            mask_token: ``1 1 dim``; given with ``replaced``, and the caller's: an encoder to keep has none.
        """
        patches = to_patches(images, self.patch)
        all_positions = self._token("pos_embed")
        positions = self._patch_positions(images.shape[-1] // self.patch)
        if visible is not None:
            patches = take(patches, visible)
            positions = take(positions.expand(len(images), -1, -1), visible)
        tokens = self._embed(patches)
        if replaced is not None:
            assert mask_token is not None
            tokens = torch.where(replaced[..., None], mask_token.to(tokens.dtype), tokens)
        tokens = tokens + positions
        class_token = (self._token("cls_token") + all_positions[:, :1]).expand(len(images), -1, -1)
        tokens = torch.cat([class_token, tokens], dim=1)
        tokens = run_blocks(self.blocks, tokens, recompute=self.grad_checkpointing)
        return self.norm(tokens)  # type: ignore[no-any-return]

    def _patch_positions(self, side: int) -> Tensor:
        """Returns the positions of ``side`` × ``side`` patches, ``1 token dim``."""
        positions = self._token("pos_embed")[:, 1:]
        if side * side == self.num_tokens:
            return positions
        own = round(self.num_tokens**0.5)
        # As DINO does for local crops; in float32, and antialiased as timm's resampling of checkpoints is.
        grid = positions.float().view(1, own, own, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
        return grid.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)

    def _token(self, name: str) -> nn.Parameter:
        """Returns a parameter that timm declares optional."""
        parameter: nn.Parameter = getattr(self, name)
        return parameter

    def _embed(self, patches: Tensor) -> Tensor:
        """Returns ``batch token dim`` of uint8 ``batch token 3 patch patch``."""
        proj = self.patch_embed.proj
        tokens: Tensor = proj(normalise(patches, dim=2).to(proj.weight.dtype))
        return tokens


def build_encoder(config: EncoderConfig, *, image_size: int) -> Encoder:
    """Returns a new encoder for square images of ``image_size`` pixels.

    Raises:
        ValueError: the patch does not divide the image.
    """
    if image_size % config.patch:
        raise ValueError(f"views.size is {image_size}; it must be a multiple of encoder.patch ({config.patch})")
    return Encoder(config, image_size=image_size)
