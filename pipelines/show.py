"""A picture of views and masks as the model sees them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maestri.pipelines.batch import Batch
from maestri.pipelines.views import CORRUPTED

_HIDDEN_LEVEL = 128
_GAP = 2
_SMALLEST_TILE = 84


def save_views_picture(batch: Batch, path: str | Path, *, num_samples: int = 8) -> None:
    """Writes a PNG with a row per sample: each view, and beside it what of it the student sees.

    That is the view with hidden tokens grey, or its corrupted twin; nothing where the student sees all of it.

    Args:
        batch: of any device.
        path: of the PNG; its folder must exist.
        num_samples: rows, from the batch's start.
    """
    tiles = []
    for name, mask in batch.token_mask.items():
        views = batch.views[name][:, :num_samples].cpu()
        if name + CORRUPTED in batch.views:
            seen = batch.views[name + CORRUPTED][:, :num_samples].cpu()
        else:
            hidden = hidden_pixels(mask[:, :num_samples].cpu(), views.shape[-1])
            seen = torch.where(hidden[:, :, None], torch.tensor(_HIDDEN_LEVEL, dtype=torch.uint8), views)
        shows_both = not torch.equal(seen, views)
        for view, seen_view in zip(views, seen, strict=True):
            tiles += [_enlarged(view), _enlarged(seen_view)] if shows_both else [_enlarged(view)]
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
