"""Where executors get their work: the batches of a training run, and those of an evaluation."""

from collections.abc import Callable, Mapping
from dataclasses import replace as changed

import numpy as np
from numpy.typing import NDArray

from maestri.pipelines.executor import PlannedBatch
from maestri.pipelines.order import Order
from maestri.pipelines.reader import CheckedReader, Samples
from maestri.pipelines.stages import Stages
from maestri.pipelines.views import ViewPlan, ViewsConfig, plan_views


class TrainingSource:
    """This rank's batches from a global position on: rows by the order, bytes by the reader, views by the plan."""

    def __init__(
        self,
        *,
        order: Order,
        reader: CheckedReader,
        views: ViewsConfig,
        patch: int,
        seed: int,
        first: int,
        step: int,
        size: int,
        stages: Stages,
    ) -> None:
        """Describes the batches.

        Args:
            order: of the samples.
            reader: of their bytes.
            views: what is done to them.
            patch: side of a token in pixels.
            seed: of the views.
            first: global position of the first batch's first sample on this rank.
            step: global positions from one batch to the next: the size of the batch over all ranks.
            size: samples in a batch on this rank.
            stages: where it notes what it is at.
        """
        self._order = order
        self._reader = reader
        self._views = views
        self._patch = patch
        self._seed = seed
        self._first = first
        self._step = step
        self._size = size
        self._stages = stages

    def plan(self, index: int) -> PlannedBatch:
        """Returns the n-th batch's work; there is no end."""
        first = self._first + index * self._step
        with self._stages.at("order"):
            numbers = self._order.rows(np.arange(first, first + self._size, dtype=np.int64))
        samples = self._reader.read(numbers)
        return PlannedBatch(samples=samples, plan=self._plan_views(samples, first), position=first)

    def replace(self, planned: PlannedBatch, bad: Mapping[int, str]) -> PlannedBatch:
        """Returns the batch with other samples in the place of bad ones; crops are drawn anew for their sizes."""
        samples = self._reader.replace(planned.samples, bad)
        return changed(planned, samples=samples, plan=self._plan_views(samples, planned.position))

    def _plan_views(self, samples: Samples, first: int) -> ViewPlan:
        with self._stages.at("plan"):
            return plan_views(
                self._views,
                seed=self._seed,
                positions=np.arange(first, first + len(samples.rows), dtype=np.int64),
                widths=samples.widths,
                heights=samples.heights,
                patch=self._patch,
            )


class RowsSource:
    """Chosen rows in their order, in batches of which the last may be short."""

    def __init__(
        self,
        rows: NDArray[np.int64],
        *,
        reader: CheckedReader,
        make_plan: Callable[[Samples], ViewPlan],
        batch_size: int,
    ) -> None:
        """Describes the batches.

        Args:
            rows: what to read, ``sample``.
            reader: of their bytes; it reads all rows.
            make_plan: returns what is done to samples.
            batch_size: samples per batch.
        """
        self._rows = rows
        self._reader = reader
        self._make_plan = make_plan
        self._batch_size = batch_size

    def plan(self, index: int) -> PlannedBatch | None:
        """Returns the n-th batch's work, or None past the end."""
        first = index * self._batch_size
        if first >= len(self._rows):
            return None
        samples = self._reader.read(self._rows[first : first + self._batch_size])
        return PlannedBatch(samples=samples, plan=self._make_plan(samples), position=first)

    def replace(self, planned: PlannedBatch, bad: Mapping[int, str]) -> PlannedBatch:
        """Returns the batch with other samples in the place of bad ones."""
        samples = self._reader.replace(planned.samples, bad)
        return changed(planned, samples=samples, plan=self._make_plan(samples))
