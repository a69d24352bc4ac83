"""The DALI executor: one graph for ``cpu`` and ``gpu`` that carries a plan out and draws nothing itself."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn
from nvidia.dali.pipeline import pipeline_def
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from maestri.pipelines.reader import Samples
from maestri.pipelines.views import GroupPlan, ViewPlan

_INTERPOLATION = {"linear": DALIInterpType.INTERP_LINEAR, "cubic": DALIInterpType.INTERP_CUBIC}
_WINDOW_TYPES: list[Any] = [DALIDataType.INT32, DALIDataType.INT32, DALIDataType.FLOAT, DALIDataType.FLOAT]
_COLOUR_TYPES: list[Any] = [DALIDataType.FLOAT] * 4


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBatch:
    """What the executor is to do: encoded samples and the plan of their views."""

    samples: Samples
    """Checked samples, ``batch``."""
    plan: ViewPlan
    """What is done to each."""
    position: int
    """Global position of the first sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupShape:
    """What the graph must know of a group of views before the first batch."""

    count: int
    """Views of each sample."""
    size: int
    """Height and width of a view, in pixels."""
    has_colour: bool = False
    """Whether colours are changed."""


@pipeline_def
def view_graph(
    source: Callable[[int], list[Any]],
    shapes: Mapping[str, GroupShape],
    device: Literal["cpu", "gpu"],
    interpolation: DALIInterpType,
    antialias: bool,
) -> tuple[Any, ...]:
    """Returns the graph: decode once, then for each view cut the window, resize, flip, change colours.

    Outputs are uint8 ``HWC``.

    The flip is free: it is the resize's region with its left and right swapped.
    """
    dtypes = [DALIDataType.UINT8]
    for shape in shapes.values():
        dtypes += (_WINDOW_TYPES + _COLOUR_TYPES * shape.has_colour) * shape.count
    encoded, *arguments = fn.external_source(source=source, num_outputs=len(dtypes), batch=True, dtype=dtypes)
    images = fn.decoders.image(
        encoded,
        device="mixed" if device == "gpu" else "cpu",
        output_type=DALIImageType.RGB,
        adjust_orientation=False,  # windows, width and height are those of the stored image
        use_fast_idct=False,  # darkens by 0.7 levels and saves no time
        jpeg_fancy_upsampling=True,  # chroma of the GPU's decoder as the CPU's
    )
    views = []
    for shape in shapes.values():
        for _ in range(shape.count):
            cut_start, cut_shape, region_start, region_end, *arguments = arguments
            # Cut before resizing: a resize by region alone reads neighbours outside of the window at its edges.
            window = fn.slice(images, cut_start, cut_shape, axes=[0, 1])
            view: Any = fn.resize(
                window,
                size=[shape.size, shape.size],
                roi_start=region_start,
                roi_end=region_end,
                interp_type=interpolation,
                antialias=antialias,
            )
            if shape.has_colour:
                brightness, contrast, saturation, hue, *arguments = arguments
                view = fn.color_twist(view, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
            views.append(view)
    return tuple(views)


def view_arguments(group: GroupPlan, samples: Samples) -> list[NDArray[Any]]:
    """Returns the graph's arguments for each view of a group.

    They are the cut's start and shape, the region's start and end (y, x), and what is done to colours, if anything is.
    """
    windows: NDArray[Any] = group.windows
    cut_start: NDArray[Any]
    cut_shape: NDArray[Any]
    if windows.dtype == np.int32:
        cut_start, cut_shape = windows[..., :2], windows[..., 2:]
        start: NDArray[Any] = np.zeros(cut_start.shape, np.float32)
        end = cut_shape.astype(np.float32)
    else:
        cut_shape = np.broadcast_to(np.stack((samples.heights, samples.widths), -1), (*windows.shape[:2], 2))
        cut_shape = cut_shape.astype(np.int32)
        cut_start = np.zeros_like(cut_shape)
        start = windows[..., :2].copy()
        end = start + windows[..., 2:]
    flipped = group.flip
    start[flipped, 1], end[flipped, 1] = end[flipped, 1], start[flipped, 1]
    arrays = [cut_start, cut_shape, start, end]
    if group.colour is not None:
        arrays += list(np.moveaxis(group.colour, -1, 0))
    return [np.ascontiguousarray(array[view]) for view in range(len(windows)) for array in arrays]


class DaliExecutor:
    """An iterator of (planned batch, its views), a few batches ahead of the caller.

    The source is called in the caller's thread, inside ``next``; decoding and resizing run in DALI's threads or on the
    GPU.  An exception in DALI's callback would lose the batches already under way, so it is kept, the graph is drained,
    and it is raised where it belongs: after the last good batch.
    """

    def __init__(
        self,
        source: Callable[[int], PlannedBatch | None],
        *,
        shapes: Mapping[str, GroupShape],
        batch_size: int,
        device: torch.device,
        interpolation: Literal["linear", "cubic"],
        antialias: bool,
        num_threads: int,
        prefetch: int,
    ) -> None:
        """Describes the graph; it is built, and reading begins, with the first ``next``.

        Args:
            source: returns the n-th batch's work, or None past the end.
            shapes: of the groups of views, in the plan's order.
            batch_size: the largest number of samples in a batch.
            device: ``cpu`` or a CUDA device, where decoding runs and the views end up.
            interpolation: filter of the resize.
            antialias: whether the filter widens when shrinking.
            num_threads: CPU threads.
            prefetch: batches under way ahead of the caller.
        """
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device is {device}; the dali executor runs on cpu or cuda")
        self._source = source
        self._shapes = dict(shapes)
        self._device = device
        self._planned: deque[PlannedBatch] = deque()
        self._in_use: deque[tuple[Any, Any]] = deque()
        self._error: Exception | None = None
        on_gpu = device.type == "cuda"
        self._pipeline: Any = view_graph(
            source=self._feed,
            shapes=self._shapes,
            device="gpu" if on_gpu else "cpu",
            interpolation=_INTERPOLATION[interpolation],
            antialias=antialias,
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=(device.index if device.index is not None else torch.cuda.current_device()) if on_gpu else None,
            prefetch_queue_depth=prefetch,
        )

    def __iter__(self) -> "DaliExecutor":
        """Returns itself."""
        return self

    def __next__(self) -> tuple[PlannedBatch, dict[str, Tensor]]:
        """Returns the next batch's work and its views, uint8 ``view batch 3 height width`` by group (channels-last)."""
        if self._pipeline is None:
            raise self._error or StopIteration
        try:
            outputs = self._run()
        except StopIteration:
            raise (self._error or StopIteration) from None
        except RuntimeError as error:
            rows = self._planned[0].samples.rows.tolist() if self._planned else []
            self._error = RuntimeError(f"DALI failed on the batch of rows {rows}: {error}")
            self.close()
            raise self._error from error
        views, first = {}, 0
        for name, shape in self._shapes.items():
            views[name] = self._hand_over(outputs[first : first + shape.count])
            first += shape.count
        self._release(outputs)
        return self._planned.popleft(), views

    def close(self) -> None:
        """Ends DALI's threads and frees its memory; can be called twice.  Views handed out stay valid."""
        while self._in_use:
            self._in_use.popleft()[0].synchronize()
        self._pipeline = None
        self._planned.clear()

    def _run(self) -> tuple[Any, ...]:
        """Returns the graph's next outputs, ordered on torch's current stream if they are on a GPU."""
        if self._device.type == "cpu":
            return tuple(self._pipeline.run())
        return tuple(self._pipeline.run(torch.cuda.current_stream(self._device)))

    def _feed(self, index: int) -> list[Any]:
        """Returns the n-th batch's arguments in the graph's order: DALI's callback."""
        if self._error is not None:
            raise StopIteration
        try:
            planned = self._source(index)
        except Exception as error:  # carried to __next__, which raises it
            self._error = error
            raise StopIteration from None
        if planned is None:
            raise StopIteration
        arguments: list[Any] = [planned.samples.encoded]
        for name in self._shapes:
            arguments += view_arguments(planned.plan.groups[name], planned.samples)
        self._planned.append(planned)
        return arguments

    def _hand_over(self, outputs: tuple[Any, ...]) -> Tensor:
        """Returns the views as one tensor ``view batch 3 height width``.

        On the CPU a single view is DALI's own memory, without a copy: with the default executor a tensor made through
        DLPack owns it.  Several views are joined by the one copy of this path.
        """
        views = [from_dlpack(output.as_tensor()) for output in outputs]
        alone = len(views) == 1 and self._device.type == "cpu"
        joined = views[0][None] if alone else torch.stack(views)
        return joined.permute(0, 1, 4, 2, 3)

    def _release(self, outputs: tuple[Any, ...]) -> None:
        """Keeps a GPU batch's DALI memory until the copy out of it, queued on torch's stream, is done."""
        if self._device.type == "cpu":
            return
        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self._device))
        self._in_use.append((done, outputs))
        while self._in_use and (len(self._in_use) > 4 or self._in_use[0][0].query()):
            # Waits only where the caller has queued four batches' work without the GPU having begun on the first.
            self._in_use.popleft()[0].synchronize()
