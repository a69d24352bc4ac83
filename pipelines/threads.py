"""The ``threads`` executor: a pool of threads on the CPU carries a plan out, straight into the batch's memory."""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maestri.pipelines.corruption import corrupt_into
from maestri.pipelines.executor import ExecutorOptions, PlannedBatch, Plans, Source, with_index
from maestri.pipelines.memory import BatchMemory
from maestri.pipelines.pixel_ops import PixelOps, Undecodable, ViewSteps, colour_matrices
from maestri.pipelines.views import CORRUPTED, GroupPlan

_CHUNKS_PER_THREAD = 4
"""Pieces that a batch is cut into for each thread: one that is done early finds more to do."""
_CHUNK_SAMPLES = 4, 16
"""Fewest and most samples of a chunk, even, so that both samples of a pair are in the same one."""
_UNCHANGED = np.array((1, 1, 1, 0), np.float32)
"""Factors that leave colours as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _UnderWay:
    """A batch that the pool works on."""

    planned: PlannedBatch
    """What is to be done."""
    views: dict[str, Tensor]
    """Where the views are written, uint8 ``view batch height width 3`` in the host's memory."""
    chunks: "list[Future[dict[int, str]]]"
    """For each chunk: samples that can't be decoded, and why."""


class ThreadsExecutor:
    """An iterator of (planned batch, its views), a few batches ahead of the caller.

    The source is called in the caller's thread, inside ``next``; decoding and all work on pixels run in the pool, on
    one thread for each sample.  So OpenCV's own threads are turned off for the whole process (``cv2.setNumThreads``);
    torch's are left as they are, since the kernel that is used has none.
    """

    def __init__(self, source: Source, options: ExecutorOptions) -> None:
        """Notes what to do; threads start, and reading begins, with the first ``next``.

        Raises:
            ValueError: the device is neither the CPU nor a CUDA device.
        """
        cv2.setNumThreads(1)
        self._source = source
        self._plans = Plans(source)
        self._options = options
        self._device = with_index(options.device)
        self._pool = ThreadPoolExecutor(options.num_threads, thread_name_prefix="maestri-views")
        self._own = threading.local()
        self._memory = BatchMemory()
        self._under_way: deque[_UnderWay] = deque()
        self._is_closed = False

    def __iter__(self) -> "ThreadsExecutor":
        """Returns itself."""
        return self

    def __next__(self) -> tuple[PlannedBatch, dict[str, Tensor]]:
        """Returns the next batch's work and its views, uint8 ``view batch 3 height width`` by group (channels-last).

        Raises:
            TooManyBadSamples: the source's budget of bad samples is spent.
        """
        while not self._is_closed and len(self._under_way) < self._options.prefetch and self._plan_next():
            pass
        if self._is_closed or not self._under_way:
            self.close()
            raise self._plans.error or StopIteration
        batch = self._under_way[0]
        try:
            planned = self._finish(batch)
        except Exception as error:
            self._plans.error = error
            self.close()
            raise
        self._under_way.popleft()
        return planned, {name: self._hand_over(views) for name, views in batch.views.items()}

    def close(self) -> None:
        """Ends the threads and drops all that is under way; can be called twice.  Views handed out stay valid."""
        self._is_closed = True
        self._pool.shutdown(cancel_futures=True)
        self._under_way.clear()
        self._own, self._memory = threading.local(), BatchMemory()

    def _plan_next(self) -> bool:
        """Asks the source for another batch and gives it to the pool; returns False where there is none."""
        planned = self._plans.next()
        if planned is None:
            return False
        num_samples = len(planned.samples.encoded)
        size = _chunk_size(num_samples, self._options.num_threads)
        views = self._make_room(planned)
        chunks = [
            self._pool.submit(self._work, planned, views, range(first, min(first + size, num_samples)))
            for first in range(0, num_samples, size)
        ]
        self._under_way.append(_UnderWay(planned=planned, views=views, chunks=chunks))
        return True

    def _make_room(self, planned: PlannedBatch) -> dict[str, Tensor]:
        """Returns memory for the views, pinned where a GPU copies from it."""
        views, num_samples = {}, len(planned.samples.encoded)
        for name, group in planned.plan.groups.items():
            shape = (len(group.windows), num_samples, group.size, group.size, 3)
            for view_name in (name,) if group.corruption is None else (name, name + CORRUPTED):
                if self._device.type == "cuda":
                    views[view_name] = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
                else:
                    views[view_name] = self._memory.borrow(shape)
        return views

    def _finish(self, batch: _UnderWay) -> PlannedBatch:
        """Waits for a batch; returns its plan, in which samples are replaced as long as some can't be decoded."""
        planned = batch.planned
        bad: dict[int, str] = {}
        for chunk in batch.chunks:
            bad.update(chunk.result())
        while bad:
            planned = self._source.replace(planned, bad)
            bad = self._work(planned, batch.views, sorted(bad))
        return planned

    def _hand_over(self, views: Tensor) -> Tensor:
        """Returns the views as ``view batch 3 height width``, on the device."""
        if self._device.type == "cuda":
            views = views.to(self._device, non_blocking=True)
        return views.permute(0, 1, 4, 2, 3)

    def _work(self, planned: PlannedBatch, views: Mapping[str, Tensor], numbers: Sequence[int]) -> dict[int, str]:
        """Writes the views of some samples of a batch; returns which of them can't be decoded, and why.

        Time goes to the stages "decode", "resize", "colour" (flip and all that follows) and "corrupt".
        """
        stages = self._options.stages
        arrays = {name: tensor.numpy() for name, tensor in views.items()}
        with stages.at("views", f"of position {planned.position + numbers[0]} and on", counts=False):
            ops: PixelOps | None = getattr(self._own, "ops", None)
            if ops is None:
                ops = self._own.ops = PixelOps(self._options.interpolation, self._options.antialias)
            clock = ops.clock = stages.clock
            bad = _write_views(ops, planned, arrays, numbers)
            for name, seconds in ops.seconds.items():
                stages.add(name, seconds)
                ops.seconds[name] = 0.0
            if any(group.corruption is not None for group in planned.plan.groups.values()):
                began = clock()
                _write_corrupted(planned, arrays, [number for number in numbers if number not in bad], bad)
                stages.add("corrupt", clock() - began)
        return bad


def _chunk_size(num_samples: int, num_threads: int) -> int:
    """Returns how many samples are one thread's work at a time: an even number."""
    fewest, most = _CHUNK_SAMPLES
    return min(max(num_samples // (_CHUNKS_PER_THREAD * num_threads) // 2 * 2, fewest), most)


def _write_views(
    ops: PixelOps, planned: PlannedBatch, arrays: Mapping[str, NDArray[np.uint8]], numbers: Sequence[int]
) -> dict[int, str]:
    """Writes the clean views of some samples; returns which of them can't be decoded, and why."""
    samples = planned.samples
    # The work of each view, and where it goes: looked up once for all samples of a chunk.
    work = [
        (arrays[name][view], steps)
        for name, group in planned.plan.groups.items()
        for view, steps in enumerate(_steps(group, list(numbers)))
    ]
    bad = {}
    for nth, number in enumerate(numbers):
        try:
            image = ops.decode(samples.encoded[number], int(samples.widths[number]), int(samples.heights[number]))
        except Undecodable as error:
            bad[number] = str(error)
            continue
        for out, steps in work:
            ops.make_view(out[number], image, steps[nth])
    return bad


def _steps(group: GroupPlan, numbers: list[int]) -> list[list[ViewSteps]]:
    """Returns what is done for the views of some samples, ``view batch``."""
    flip = group.flip[:, numbers]
    colours: list[list[NDArray[np.float32] | None]] = [[None] * len(numbers) for _ in flip]
    if group.colour is not None:
        factors = group.colour[:, numbers]
        matrices = colour_matrices(factors)
        for view, nth in np.argwhere((factors != _UNCHANGED).any(-1)).tolist():
            colours[view][nth] = matrices[view, nth]
    columns: tuple[Any, ...] = (
        group.windows[:, numbers].tolist(),
        np.full(flip.shape, group.windows.dtype == np.int32).tolist(),
        flip.tolist(),
        colours,
        (np.zeros(flip.shape) if group.blur is None else group.blur[:, numbers]).tolist(),
        (np.zeros(flip.shape, np.bool_) if group.solarise is None else group.solarise[:, numbers]).tolist(),
    )
    return [list(map(ViewSteps, *view)) for view in zip(*columns, strict=True)]


def _write_corrupted(
    planned: PlannedBatch, arrays: Mapping[str, NDArray[np.uint8]], written: Sequence[int], bad: Mapping[int, str]
) -> None:
    """Writes the corrupted twins of samples whose clean views are written, and of their partners.

    A pair of which one can't be decoded is left for later, when it is replaced.
    """
    num_samples = len(planned.samples.encoded)
    numbers = sorted({number ^ side for number in written for side in (0, 1)} & set(range(num_samples)))
    for name, group in planned.plan.groups.items():
        if group.corruption is None:
            continue
        clean, corrupted = arrays[name], arrays[name + CORRUPTED]
        for number in numbers:
            partner = number ^ 1
            if number in bad or partner in bad:
                continue
            for view in range(len(clean)):
                corrupt_into(
                    corrupted[view, number],
                    clean[view, number],
                    clean[view, partner] if partner < num_samples else None,
                    group.corruption,
                    group.token_mask,
                    view=view,
                    sample=number,
                )
