"""DALI's graph of a view plan, and a plan's arguments in the graph's order."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn
from nvidia.dali.pipeline import pipeline_def
from nvidia.dali.types import Constant, DALIDataType, DALIImageType, DALIInterpType

from maestri.pipelines.executor import GroupShape, PlannedBatch
from maestri.pipelines.filters import SOLARISE_FROM, blur_window
from maestri.pipelines.reader import Samples
from maestri.pipelines.views import GroupPlan

INTERPOLATION = {"linear": DALIInterpType.INTERP_LINEAR, "cubic": DALIInterpType.INTERP_CUBIC}
_SMALLEST_UNCUT = 64
"""Pixels of a view from which on its window is not cut out before the resize.  Without the cut, pixels just beyond the
window take part at the view's edges; that is a tenth faster with ten views, and few pixels of a large view."""
_CUT_TYPES: list[Any] = [DALIDataType.INT32, DALIDataType.INT32]
_REGION_TYPES: list[Any] = [DALIDataType.FLOAT, DALIDataType.FLOAT]
_COLOUR_TYPES: list[Any] = [DALIDataType.FLOAT] * 4
_BLUR_TYPES: list[Any] = [DALIDataType.BOOL, DALIDataType.FLOAT, DALIDataType.INT32]
_SOLARISE_TYPES: list[Any] = [DALIDataType.BOOL]
_ALL_BITS: Any = Constant(255, dtype=DALIDataType.UINT8)
_DECODING: dict[str, Any] = {
    "output_type": DALIImageType.RGB,
    "adjust_orientation": False,  # windows, width and height are those of the stored image
    "use_fast_idct": False,  # darkens by 0.7 levels and saves no time
    "jpeg_fancy_upsampling": True,  # chroma of the GPU's decoder as the CPU's
}


def has_conditions(shapes: Mapping[str, GroupShape]) -> bool:
    """Returns whether the graph does something to some samples alone, and needs DALI's ``enable_conditionals``."""
    return any(shape.has_blur or shape.has_solarise for shape in shapes.values())


@pipeline_def
def view_graph(
    source: Callable[[int], list[Any]],
    shapes: Mapping[str, GroupShape],
    device: Literal["cpu", "gpu"],
    interpolation: DALIInterpType,
    antialias: bool,
    decodes_windows: bool,
    hardware_decoder: float,
) -> tuple[Any, ...]:
    """Returns the graph: decode once, then for each view cut the window, resize, flip, colours, blur, solarise.

    Outputs are uint8 ``HWC``.  The flip is free: it is the resize's region with its left and right swapped.  Where
    ``decodes_windows``, only the window of the only view is decoded; its pixels are the same.  ``hardware_decoder`` is
    the share of JPEGs for a GPU's hardware decoder.
    """
    dtypes = [DALIDataType.UINT8]
    for shape in shapes.values():
        dtypes += argument_types(shape, decodes_windows) * shape.count
    encoded, *arguments = fn.external_source(source=source, num_outputs=len(dtypes), batch=True, dtype=dtypes)
    images: Any = encoded
    if not decodes_windows:
        where = {"device": "mixed", "hw_decoder_load": hardware_decoder} if device == "gpu" else {"device": "cpu"}
        images = fn.decoders.image(encoded, **where, **_DECODING)
    views = []
    for shape in shapes.values():
        for _ in range(shape.count):
            window = images
            if is_cut(shape, decodes_windows):
                cut_start, cut_shape, *arguments = arguments
                window = (
                    fn.decoders.image_slice(images, cut_start, cut_shape, axes=[0, 1], **_DECODING)
                    if decodes_windows
                    else fn.slice(images, cut_start, cut_shape, axes=[0, 1])
                )
            region_start, region_end, *arguments = arguments
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
            # DALI turns these conditions into a split of the batch: only the chosen samples pay.
            if shape.has_blur:
                is_blurred, sigma, window_size, *arguments = arguments
                if is_blurred:
                    view = fn.gaussian_blur(view, sigma=sigma, window_size=window_size)
            if shape.has_solarise:
                is_solarised, *arguments = arguments
                if is_solarised:
                    view = view ^ (view >= SOLARISE_FROM) * _ALL_BITS
            views.append(view)
    return tuple(views)


def is_cut(shape: GroupShape, decodes_windows: bool) -> bool:
    """Returns whether windows are cut out, or decoded alone, before they are resized."""
    return decodes_windows or shape.size < _SMALLEST_UNCUT


def argument_types(shape: GroupShape, decodes_windows: bool) -> list[Any]:
    """Returns the types of the arguments of each view of a group."""
    return (
        _CUT_TYPES * is_cut(shape, decodes_windows)
        + _REGION_TYPES
        + _COLOUR_TYPES * shape.has_colour
        + _BLUR_TYPES * shape.has_blur
        + _SOLARISE_TYPES * shape.has_solarise
    )


def batch_arguments(planned: PlannedBatch, shapes: Mapping[str, GroupShape], *, decodes_windows: bool) -> list[Any]:
    """Returns the graph's arguments for a batch, each over ``batch``: encoded bytes, then each view's."""
    arguments: list[Any] = [planned.samples.encoded]
    for name, shape in shapes.items():
        cuts = is_cut(shape, decodes_windows)
        arguments += _group_arguments(planned.plan.groups[name], planned.samples, shape, cuts=cuts)
    return arguments


def _group_arguments(group: GroupPlan, samples: Samples, shape: GroupShape, *, cuts: bool) -> list[NDArray[Any]]:
    """Returns the arguments of each view: cut's start and shape, region's start and end (y, x), and what changes it."""
    windows: NDArray[Any] = group.windows
    cut_start: NDArray[Any]
    cut_shape: NDArray[Any]
    if windows.dtype == np.int32 and cuts:
        cut_start, cut_shape = windows[..., :2], windows[..., 2:]
        start: NDArray[Any] = np.zeros(cut_start.shape, np.float32)
        end = cut_shape.astype(np.float32)
    else:
        cut_shape = np.broadcast_to(np.stack((samples.heights, samples.widths), -1), (*windows.shape[:2], 2))
        cut_shape = cut_shape.astype(np.int32)
        cut_start = np.zeros_like(cut_shape)
        start = windows[..., :2].astype(np.float32)
        end = start + windows[..., 2:].astype(np.float32)
    flipped = group.flip
    start[flipped, 1], end[flipped, 1] = end[flipped, 1], start[flipped, 1]
    arrays = [cut_start, cut_shape, start, end] if cuts else [start, end]
    planned = group.colour is not None, group.blur is not None, group.solarise is not None
    assert planned == (shape.has_colour, shape.has_blur, shape.has_solarise), f"{shape} has a plan of something else"
    if group.colour is not None:
        arrays += list(np.moveaxis(group.colour, -1, 0))
    if group.blur is not None:
        arrays += [group.blur > 0, group.blur, blur_window(group.blur)]
    if group.solarise is not None:
        arrays.append(group.solarise)
    assert len(windows) == shape.count, f"{len(windows)} views planned, the graph has {shape.count}"
    return [np.ascontiguousarray(array[view]) for view in range(len(windows)) for array in arrays]
