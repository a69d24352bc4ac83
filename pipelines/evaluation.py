"""Batches for evaluation: chosen rows in their order, centre crop, no flip, no mask."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maestri.pipelines.dali import DaliExecutor, GroupShape, PlannedBatch
from maestri.pipelines.reader import CheckedReader
from maestri.pipelines.views import GLOBAL, plan_center
from maestri.shards.shard_set import ShardSet


def evaluation_batches(
    shard_set: ShardSet,
    rows: NDArray[np.int64],
    *,
    size: int,
    crop_fraction: float,
    batch_size: int,
    device: torch.device,
    num_threads: int,
    interpolation: Literal["linear", "cubic"] = "cubic",
    max_bad: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (images, labels) of the rows in order; the last batch may be short.

    Args:
        shard_set: the samples.
        rows: which of them, ``sample``.
        size: height and width of the images, in pixels.
        crop_fraction: side of the centre crop, as a fraction of the image's shorter side.
        batch_size: images per batch.
        device: where batches are wanted, and where DALI decodes.
        num_threads: CPU threads.
        interpolation: filter of the resize; it is always antialiased.
        max_bad: bad samples that are replaced (by the next good row, image and label) before it is an error.

    Yields:
        Images, uint8 ``batch 3 height width`` (channels-last), and labels, int64 ``batch``.
    """
    rows = np.asarray(rows, np.int64)
    reader = CheckedReader(shard_set, num_rows=len(shard_set), max_bad=max_bad)

    def plan(index: int) -> PlannedBatch | None:
        first = index * batch_size
        if first >= len(rows):
            return None
        samples = reader.read(rows[first : first + batch_size])
        center = plan_center(size, crop_fraction=crop_fraction, widths=samples.widths, heights=samples.heights)
        return PlannedBatch(samples=samples, plan=center, position=first)

    executor = DaliExecutor(
        plan,
        shapes={GLOBAL: GroupShape(count=1, size=size)},
        batch_size=batch_size,
        device=device,
        interpolation=interpolation,
        antialias=True,
        num_threads=num_threads,
        prefetch=2,
    )
    try:
        for planned, views in executor:
            labels = torch.from_numpy(np.array(shard_set.label(planned.samples.rows), np.int64))
            yield views[GLOBAL][0], labels.to(device)
    finally:
        executor.close()
