"""A batch that stays on the device: the shapes and masks of the real ones, and noise for pixels."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from maestri.pipelines.batch import Batch
from maestri.pipelines.masks import split_indices
from maestri.pipelines.views import CORRUPTED, GLOBAL, ViewsConfig, plan_views


def resident_batch(
    views: ViewsConfig, *, patch: int, seed: int, positions: Sequence[int], device: torch.device
) -> Batch:
    """Returns a batch of noise, masked and corrupted as the loader would mask and corrupt these positions.

    Args:
        views: what the views are.
        patch: side of a token in pixels.
        seed: of masks and noise.
        positions: global positions of this rank's samples.
        device: where the batch lies.
    """
    numbers = np.asarray(positions, np.int64)
    sides = np.full(len(numbers), views.size, np.int64)
    plan = plan_views(views, seed=seed, positions=numbers, widths=sides, heights=sides, patch=patch)
    generator = torch.Generator().manual_seed(seed + int(numbers[0]))
    pixels: dict[str, Tensor] = {}
    token_mask, visible, masked, pixel_mask = {}, {}, {}, {}
    for name, group in plan.groups.items():
        shape = (len(group.token_mask), len(numbers), 3, group.size, group.size)
        pixels[name] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        token_mask[name] = torch.from_numpy(group.token_mask.copy())
        if group.corruption is not None:
            pixels[name + CORRUPTED] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            if group.corruption.pixels is not None:
                pixel_mask[name] = torch.from_numpy(group.corruption.pixels.copy())
        elif name != GLOBAL or views.mask.constant_count:
            visible[name], masked[name] = map(torch.from_numpy, split_indices(group.token_mask))

    def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    return Batch(
        views=moved(pixels),
        token_mask=moved(token_mask),
        visible=moved(visible),
        masked=moved(masked),
        pixel_mask=moved(pixel_mask),
        labels=torch.full((len(numbers),), -1, device=device),
        rows=torch.from_numpy(numbers).to(device),
        position=int(numbers[0]),
    )


def repeated(batch: Batch) -> Iterator[Batch]:
    """Yields one batch for ever."""
    while True:
        yield batch
