"""Pixels of the ``threads`` executor: what makes one view out of one encoded sample, on one thread.

Each step is the fastest exact kernel that was found on a CPU: simplejpeg's libjpeg-turbo, torch's uint8 resize (that of
torchvision v2, bit for bit) and OpenCV for the rest.  All of them release Python's lock.
"""

import io
import math
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from maestri.pipelines.colour import colour_map
from maestri.pipelines.filters import blur_kernel
from maestri.pipelines.header import BadHeader, image_size

_TORCH: Any = torch._C._nn
"""The kernels of ``interpolate``, by a third less overhead for each call than ``torch.ops.aten`` has."""
_KERNELS = {
    ("linear", True): _TORCH._upsample_bilinear2d_aa,
    ("linear", False): _TORCH.upsample_bilinear2d,
    ("cubic", True): _TORCH._upsample_bicubic2d_aa,
    ("cubic", False): _TORCH.upsample_bicubic2d,
}
_PILLOW = {"linear": Image.Resampling.BILINEAR, "cubic": Image.Resampling.BICUBIC}
_TOLERANCE = 1 / 64
"""Pixels, of image and view, by which a fractional window may be moved to lie on torch's grid."""


class Undecodable(ValueError):
    """An encoded sample without the pixels that its index states; the reason is its text."""


class ViewSteps(NamedTuple):
    """What makes a view out of an image, in this order."""

    window: list[Any]
    """Top, left, height and width, in pixels of the image."""
    is_cut: bool
    """Whether the window (of ints) is cut out, then resized; otherwise the image is resized, then cut."""
    flip: bool
    """Mirrored left to right."""
    colour: NDArray[np.float32] | None
    """Linear map of colours, ``3 4``; None for no change."""
    sigma: float
    """Of the blur, in pixels; 0 for none."""
    solarise: bool
    """Whether levels from 128 on are inverted."""


class PixelOps:
    """One thread's kernels, with the buffers they work in; for one filter of the resize."""

    def __init__(self, interpolation: Literal["linear", "cubic"], antialias: bool) -> None:
        """Holds no buffers yet."""
        self._kernel = _KERNELS[interpolation, antialias]
        self._pillow = _PILLOW[interpolation]
        self._antialias = antialias
        self._decoded: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._cut: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._spare: dict[int, NDArray[np.uint8]] = {}
        self.clock: Callable[[], float] = time.perf_counter
        """What seconds are read from."""
        self.seconds = {"decode": 0.0, "resize": 0.0, "colour": 0.0}
        """How long each kind of work has taken; the caller may set them back.  ``colour`` is all that follows the
        resize: flip, colours, blur and solarise."""

    def decode(self, encoded: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
        """Returns a sample's pixels, RGB, uint8 ``height width 3``, valid until the next call; EXIF turns nothing.

        Raises:
            Undecodable: it can't be decoded, or has another size.
        """
        began = self.clock()
        self._decoded = _at_least(3 * width * height, self._decoded)
        try:
            # The size of the buffer bounds what a wrong header can ask for.
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
                encoded, "RGB", buffer=self._decoded[: 3 * width * height]
            )
        except ValueError:
            pixels = _decode_otherwise(encoded, width, height)
        if pixels.shape != (height, width, 3):
            raise Undecodable(f"{pixels.shape[1]} × {pixels.shape[0]} pixels; the index says {width} × {height}")
        self.seconds["decode"] += self.clock() - began
        return pixels

    def make_view(self, out: NDArray[np.uint8], image: NDArray[np.uint8], view: ViewSteps) -> None:
        """Writes a view of an image (RGB, uint8 ``height width 3``) to ``out``: ``size size 3``, contiguous."""
        began = self.clock()
        size = len(out)
        window, is_cut, flip, colour, sigma, solarise = view
        steps = flip + (colour is not None) + (sigma > 0) + solarise
        source, target = out, out
        if steps:
            spare = self._spare.get(size)
            if spare is None:
                spare = self._spare[size] = np.empty_like(out)
            # Each step writes to the other buffer, and the last one to ``out``.
            source, target = (spare, out) if steps % 2 else (out, spare)
        top, left, height, width = window
        if is_cut:
            self._resize(source, image[top : top + height, left : left + width])
        else:
            self._resize_region(source, image, top, left, height, width)
        resized = self.clock()
        self.seconds["resize"] += resized - began
        if not steps:
            return
        if flip:
            cv2.flip(source, 1, target)
            source, target = target, source
        if colour is not None:
            cv2.transform(source, colour, target)
            source, target = target, source
        if sigma > 0:
            weights = blur_kernel(sigma).astype(np.float32)
            # Exact to the rounding and twice as fast as cv2.GaussianBlur, whose weights have 8 bits.
            cv2.sepFilter2D(source, -1, weights, weights, target, borderType=cv2.BORDER_REFLECT_101)
            source, target = target, source
        if solarise:
            # The lesser of x and 255 − x is 255 − x from 128 on.
            cv2.bitwise_not(source, target)
            cv2.min(source, target, target)
        self.seconds["colour"] += self.clock() - resized

    def _resize(
        self, out: NDArray[np.uint8], cut: NDArray[np.uint8], scales: tuple[float | None, float | None] = (None, None)
    ) -> None:
        """Writes a part of an image, resized; ``scales`` are sizes of the part's pixels where not all of it is used."""
        height, width, _ = cut.shape
        # The kernel would copy a window that isn't contiguous, too, but with OpenMP threads of its own.
        self._cut = _at_least(cut.size, self._cut)
        copied = self._cut[: cut.size].reshape(height, width, 3)
        np.copyto(copied, cut)
        self._kernel(_channels_last(copied), out.shape[:2], False, *scales, out=_channels_last(out))

    def _resize_region(
        self, out: NDArray[np.uint8], image: NDArray[np.uint8], top: float, left: float, height: float, width: float
    ) -> None:
        """Writes a region of the resized image; its neighbours take part at its edges.

        Torch's kernel begins at whole pixels.  So a few rows and columns before the region are resized with it, as many
        as it takes to begin at a whole pixel, and dropped; where no number of them does, Pillow resizes, seven times
        as slowly.
        """
        size = len(out)
        bounds = []
        for start, length, limit in ((top, height, image.shape[0]), (left, width, image.shape[1])):
            scale = length / size
            reach = 2 * max(scale, 1.0)
            margin = _margin(start, scale, reach)
            if margin is None:
                self._resize_by_pillow(out, image, (left, top, left + width, top + height))
                return
            bounds.append((margin, round(start - margin * scale), min(limit, math.ceil(start + length + reach))))
        (rows, first_row, last_row), (columns, first_column, last_column) = bounds
        wider = np.empty((size + rows, size + columns, 3), np.uint8)
        self._resize(wider, image[first_row:last_row, first_column:last_column], (size / height, size / width))
        np.copyto(out, wider[rows:, columns:])

    def _resize_by_pillow(
        self, out: NDArray[np.uint8], image: NDArray[np.uint8], box: tuple[float, float, float, float]
    ) -> None:
        """Writes any region of the resized image."""
        picture, shape = Image.fromarray(image), (len(out), len(out))
        if self._antialias:
            inside = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], picture.width), min(box[3], picture.height))
            resized = picture.resize(shape, self._pillow, box=inside)
        else:
            resized = picture.transform(shape, Image.Transform.EXTENT, box, self._pillow)
        np.copyto(out, np.asarray(resized))


def colour_matrices(factors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns ``colour_map`` of many views at once: ``… 4`` → ``… 3 4``, the offset last.

    The map is linear in saturation × cosine and sine of the hue, so three of its values give all.
    """
    brightness, contrast, saturation, hue = np.moveaxis(factors.astype(np.float64), -1, 0)[..., None, None]
    angle = np.deg2rad(hue)
    mapped = brightness * contrast * (_GREY + saturation * (np.cos(angle) * _UNTURNED + np.sin(angle) * _TURNED))
    offset = brightness * (1.0 - contrast) * _LIFT
    return np.concatenate((mapped, offset), -1).astype(np.float32)


def _colour_basis() -> tuple[NDArray[np.float64], ...]:
    """Returns what ``colour_map`` does at a saturation of 0, and adds at a hue of 0° and 90°; and its offset."""
    grey, unturned, turned = (
        colour_map(np.array(factors, np.float32))[0] for factors in ((1, 1, 0, 0), (1, 1, 1, 0), (1, 1, 1, 90))
    )
    lift = colour_map(np.array((1, 0, 1, 0), np.float32))[1]
    return grey, unturned - grey, turned - grey, lift[:, None]


_GREY, _UNTURNED, _TURNED, _LIFT = _colour_basis()


def _decode_otherwise(encoded: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Returns the pixels of a PNG, or of a JPEG that libjpeg warns of: DALI takes those, too."""
    data = encoded.tobytes()
    try:
        found = image_size(data)
    except BadHeader as error:
        raise Undecodable(str(error)) from None
    if found != (width, height):
        raise Undecodable(f"{found[0]} × {found[1]} pixels; the index says {width} × {height}")
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except Exception as error:  # of many types, as the damage has it
        raise Undecodable(f"{type(error).__name__}: {error}".partition("\n")[0]) from error


def _margin(start: float, scale: float, reach: float) -> int | None:
    """Returns how many output pixels before ``start`` a resize may begin, on a whole pixel; None if nowhere."""
    tolerance = _TOLERANCE * min(scale, 1.0)
    for margin in range(int(start / scale + _TOLERANCE) + 1):
        first = start - margin * scale
        whole = round(first)
        # What the filter reaches before the region must be there, too, unless the image ends there.
        if abs(first - whole) <= tolerance and (whole == 0 or (margin + 0.5) * scale >= reach):
            return margin
    return None


def _channels_last(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Returns contiguous pixels ``height width 3`` as torch's ``1 3 height width``, without a copy."""
    height, width, _ = pixels.shape
    return torch.from_numpy(pixels).as_strided((1, 3, height, width), (3 * height * width, 1, 3 * width, 3))


def _at_least(num_bytes: int, buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns the buffer, or a larger one if it is too small."""
    return buffer if buffer.size >= num_bytes else np.empty(num_bytes, np.uint8)
