"""Batches for evaluation: chosen rows in their order, centre crop, no flip, no mask."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maestri.pipelines.executor import ExecutorOptions, GroupShape, choose_executor, executor_class
from maestri.pipelines.reader import CheckedReader, Samples
from maestri.pipelines.source import RowsSource
from maestri.pipelines.views import GLOBAL, ViewPlan, plan_center
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
    executor: Literal["auto", "dali", "threads"] = "auto",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (images, labels) of the rows in order; the last batch may be short.

    Args:
        shard_set: the samples.
        rows: which of them, ``sample``.
        size: height and width of the images, in pixels.
        crop_fraction: side of the centre crop, as a fraction of the image's shorter side.
        batch_size: images per batch.
        device: where batches are wanted.
        num_threads: CPU threads.
        interpolation: filter of the resize; it is always antialiased.
        max_bad: bad samples that are replaced (by the next good row, image and label) before it is an error.
        executor: what decodes and resizes.

    Yields:
        Images, uint8 ``batch 3 height width`` (channels-last), and labels, int64 ``batch``.
    """

    def make_plan(samples: Samples) -> ViewPlan:
        return plan_center(size, crop_fraction=crop_fraction, widths=samples.widths, heights=samples.heights)

    reader = CheckedReader(shard_set, num_rows=len(shard_set), max_bad=max_bad)
    source = RowsSource(np.asarray(rows, np.int64), reader=reader, make_plan=make_plan, batch_size=batch_size)
    options = ExecutorOptions(
        shapes={GLOBAL: GroupShape(count=1, size=size)},
        batch_size=batch_size,
        device=device,
        interpolation=interpolation,
        antialias=True,
        num_threads=num_threads,
        prefetch=2,
    )
    batches = executor_class(choose_executor(executor, device))(source, options)
    try:
        for planned, views in batches:
            labels = torch.from_numpy(np.array(shard_set.label(planned.samples.rows), np.int64))
            yield views[GLOBAL][0], labels.to(device)
    finally:
        batches.close()
