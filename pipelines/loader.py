"""The training loader: an endless iterator of batches whose whole state is a position."""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maestri.pipelines.ahead import Ahead
from maestri.pipelines.batch import Batch
from maestri.pipelines.config import DataConfig
from maestri.pipelines.executor import (
    Executor,
    ExecutorOptions,
    PlannedBatch,
    choose_executor,
    executor_class,
    group_shapes,
    with_index,
)
from maestri.pipelines.masks import split_indices
from maestri.pipelines.order import Order, slice_of
from maestri.pipelines.reader import CheckedReader
from maestri.pipelines.selection import identity, select_rows, shard_sizes
from maestri.pipelines.source import TrainingSource
from maestri.pipelines.stages import Stages
from maestri.pipelines.views import GLOBAL, ViewsConfig
from maestri.shards.shard_set import ShardSet


class Loader:
    """An endless iterator of this rank's batches, on its device.

    The n-th global batch holds the global positions [n·B, (n+1)·B), whatever the number of ranks, and each rank yields
    its slice of it.  So the state is one number, the first position not yet taken, and a run may continue on another
    number of ranks.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        *,
        config: DataConfig,
        views: ViewsConfig,
        patch: int,
        seed: int,
        rank: int,
        world_size: int,
        global_size: int,
        num_rows: int | None = None,
        device: torch.device,
    ) -> None:
        """Makes a loader; nothing is read before the first ``next``.

        Args:
            shard_set: the samples.
            config: how they are read.
            views: what is done to them.
            patch: side of a token in pixels.
            seed: of order, views and masks.
            rank: this process's number.
            world_size: the number of processes.
            global_size: samples per micro-batch over all ranks.
            num_rows: rows [0, num_rows), as far as selected, are trained on; all but ``config.holdout`` if None.
            device: where batches are wanted.

        Raises:
            ValueError: slices would differ between ranks, no rows are left to train on, a selection that can't be
                made, or views don't fit patches.
        """
        if num_rows is None:
            num_rows = len(shard_set) - config.holdout
        if not 0 < num_rows <= len(shard_set):
            raise ValueError(
                f"{num_rows} rows to train on, of {len(shard_set)} in the data set with data.holdout {config.holdout}; "
                f"expected 1 to {len(shard_set)}"
            )
        sizes = {"views.size": views.size} | ({"views.local.size": views.local.size} if views.local.count else {})
        for name, size in sizes.items():
            if patch < 1 or size % patch:
                raise ValueError(f"{name} is {size}; expected a multiple of the encoder's patch, {patch}")
        self._shard_set = shard_set
        self._config = config
        self._views = views
        self._patch = patch
        self._seed = seed
        self._global_size = global_size
        self._device = with_index(device)  # here, and not in the loader's thread
        self._slice = slice_of(rank, world_size, global_size)
        selected = select_rows(shard_set, config.select, num_rows=num_rows)
        self._selected = identity(selected)
        num_rows = num_rows if selected is None else len(selected)
        windowed = config.order.kind == "windowed"
        self._order = Order(
            config.order,
            num_rows=num_rows,
            seed=seed,
            shard_sizes=shard_sizes(shard_set, selected, num_rows) if windowed else None,
        )
        self._stages = Stages()
        self._reader = CheckedReader(
            shard_set,
            num_rows=num_rows,
            max_bad=config.max_bad,
            selected=selected,
            num_threads=config.read_threads,
            stages=self._stages,
        )
        self._batches: Ahead[Batch] | None = None
        self._position = 0
        self._closed = False
        self.wait_seconds = 0.0
        """Seconds spent inside ``next`` so far: what the training step waited for data."""

    @property
    def stages(self) -> Stages:
        """What the loader's threads are at, and how long each stage has taken so far."""
        return self._stages

    @property
    def num_bad(self) -> int:
        """Different bad samples that this rank has replaced so far."""
        return self._reader.num_bad

    def __iter__(self) -> "Loader":
        """Returns itself."""
        return self

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
            RuntimeError: the loader is closed.
            TooManyBadSamples: more bad samples than ``data.max_bad``.
            LoaderStuck: no batch within ``data.timeout``.
            OSError: the storage failed.
        """
        if self._closed:
            raise RuntimeError("the loader is closed")
        began = time.perf_counter()
        if self._batches is None:
            self._batches = self._start()
        batch = next(self._batches)
        self._position += self._global_size
        self.wait_seconds += time.perf_counter() - began
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Returns the first global position not yet taken, and what must be the same for it to mean the same."""
        return {"position": self._position, **self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a saved position, on any number of ranks.

        Raises:
            ValueError: the state was saved with other shards, seed, order, number of rows or global batch.
        """
        expected = self._fingerprint()
        if state.keys() != {"position", *expected}:
            raise ValueError(f"the loader's state holds {sorted(state)}; expected {sorted(['position', *expected])}")
        for name, value in expected.items():
            if state[name] != value:
                raise ValueError(f"the loader's state was saved with {name} {state[name]!r}; this run has {value!r}")
        position = state["position"]
        if not isinstance(position, int) or position < 0 or position % self._global_size:
            raise ValueError(f"the loader's position is {position!r}; expected a multiple of {self._global_size}")
        self._stop()
        self._position = position

    def close(self) -> None:
        """Ends the loader's threads; can be called twice.  The ShardSet stays open, and batches handed out valid."""
        self._closed = True
        self._stop()

    def __enter__(self) -> "Loader":
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the loader."""
        self.close()

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "shards": self._shard_set.manifest.recipe,
            "seed": self._seed,
            "selected": self._selected,
            **self._order.fingerprint(),
            "global_size": self._global_size,
        }

    def _start(self) -> Ahead[Batch]:
        """Returns the batches from the position on, made by a thread."""
        # Imported here and not in the thread: DALI's end at exit must come after ours.
        make_executor = executor_class(choose_executor(self._config.executor, self._device))
        return Ahead(
            partial(self._make_batches, make_executor, self._position),
            tensors=_tensors_of,
            device=self._device,
            depth=1,
            timeout=self._config.timeout,
            stages=self._stages,
            name="maestri-loader",
        )

    def _stop(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _make_batches(
        self, make_executor: Callable[[TrainingSource, ExecutorOptions], Executor], position: int
    ) -> Iterator[Batch]:
        """Yields batches from a global position on; runs in the loader's thread."""
        size = self._slice.stop - self._slice.start
        source = TrainingSource(
            order=self._order,
            reader=self._reader,
            views=self._views,
            patch=self._patch,
            seed=self._seed,
            first=position + self._slice.start,
            step=self._global_size,
            size=size,
            stages=self._stages,
        )
        options = ExecutorOptions(
            shapes=group_shapes(self._views),
            batch_size=size,
            device=self._device,
            interpolation=self._views.interpolation,
            antialias=self._views.antialias,
            num_threads=self._config.num_threads,
            prefetch=self._config.prefetch,
            hardware_decoder=self._config.hardware_decoder,
            stages=self._stages,
        )
        executor = make_executor(source, options)
        try:
            for planned, views in executor:
                yield self._assemble(planned, views)
        finally:
            executor.close()

    def _assemble(self, planned: PlannedBatch, views: dict[str, Tensor]) -> Batch:
        """Returns the batch: the executor's views beside the plan's masks and the rows' labels."""
        token_mask, visible, masked, pixel_mask = {}, {}, {}, {}
        for name, group in planned.plan.groups.items():
            token_mask[name] = self._to_device(group.token_mask)
            if group.corruption is None:
                if name != GLOBAL or self._views.mask.constant_count:
                    visible_tokens, masked_tokens = split_indices(group.token_mask)
                    visible[name] = self._to_device(visible_tokens)
                    masked[name] = self._to_device(masked_tokens)
            elif group.corruption.pixels is not None:
                pixel_mask[name] = self._to_device(group.corruption.pixels)
        rows = planned.samples.rows
        return Batch(
            views=views,
            token_mask=token_mask,
            visible=visible,
            masked=masked,
            pixel_mask=pixel_mask,
            labels=self._to_device(np.asarray(self._shard_set.label(rows), np.int64)),
            rows=self._to_device(rows),
            position=planned.position,
        )

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        """Returns the array as a tensor on the device; to a GPU through pinned memory, without waiting."""
        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))  # a broadcast array is read-only
        if self._device.type == "cpu":
            return tensor
        # torch's allocator keeps the pinned block until the copy is done.
        return tensor.pin_memory().to(self._device, non_blocking=True)


def _tensors_of(batch: Batch) -> Iterable[Tensor]:
    """Yields all tensors of a batch."""
    for mapping in (batch.views, batch.token_mask, batch.visible, batch.masked, batch.pixel_mask):
        yield from mapping.values()
    yield batch.labels
    yield batch.rows
