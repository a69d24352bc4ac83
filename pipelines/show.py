"""A picture of views and masks as the model sees them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maestri.pipelines.batch import Batch

_HIDDEN_LEVEL = 128
_GAP = 2
_SMALLEST_TILE = 84


def save_views_picture(batch: Batch, path: str | Path, *, num_samples: int = 8) -> None:
    """Writes a PNG with a row per sample: each view, and beside it what of it the student sees (hidden tokens grey).

    Args:
        batch: of any device.
        path: of the PNG; its folder must exist.
        num_samples: rows, from the batch's start.
    """
    tiles = []
    for name, group in batch.views.items():
        views = group[:, :num_samples].cpu()
        hidden = hidden_pixels(batch.token_mask[name][:, :num_samples].cpu(), views.shape[-1])
        masked = torch.where(hidden[:, :, None], torch.tensor(_HIDDEN_LEVEL, dtype=torch.uint8), views)
        for view, masked_view in zip(views, masked, strict=True):
            tiles += [_enlarged(view), _enlarged(masked_view)]
    height = max(tile.shape[1] for tile in tiles)
    columns = [np.pad(tile, ((0, 0), (0, height - tile.shape[1] + _GAP), (0, _GAP), (0, 0))) for tile in tiles]
    grid = np.concatenate(columns, axis=2)
    Image.fromarray(grid.reshape(-1, *grid.shape[2:])).save(path, "PNG")


def hidden_pixels(token_mask: Tensor, size: int) -> Tensor:
    """Returns the mask over pixels, bool ``... height width``, of masks over tokens, ``... token``."""
    grid = round(token_mask.shape[-1] ** 0.5)
    patch = size // grid
    mask = token_mask.reshape(*token_mask.shape[:-1], grid, grid)
    return torch.repeat_interleave(torch.repeat_interleave(mask, patch, dim=-2), patch, dim=-1)


def _enlarged(images: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Returns images ``sample 3 height width`` as ``sample height width 3``, small ones a whole factor larger."""
    factor = -(-_SMALLEST_TILE // images.shape[-1])
    array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = images.permute(0, 2, 3, 1).numpy()
    return array.repeat(factor, axis=1).repeat(factor, axis=2)
