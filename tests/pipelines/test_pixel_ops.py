"""Decoding and each step of a view, against Pillow, torchvision and plain numpy."""

import io
import subprocess
import sys
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from maestri.pipelines.colour import colour_map
from maestri.pipelines.filters import SOLARISE_FROM, blur_kernel
from maestri.pipelines.pixel_ops import PixelOps, Undecodable, ViewSteps, colour_matrices
from maestri.pipelines.views import GLOBAL, plan_center

_MODES = {"linear": InterpolationMode.BILINEAR, "cubic": InterpolationMode.BICUBIC}
_FILTERS = {"linear": Image.Resampling.BILINEAR, "cubic": Image.Resampling.BICUBIC}
INTERPOLATIONS = pytest.mark.parametrize("interpolation", ["linear", "cubic"])


def _bytes(image: Image.Image, kind: str, **options: object) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)  # read-only, as the reader's


def _pillow(encoded: np.ndarray | bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(bytes(encoded))).convert("RGB"))


def _noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def _view(image: np.ndarray, window: object, size: int, ops: PixelOps | None = None, **steps: object) -> np.ndarray:
    settings = {"is_cut": True, "flip": False, "colour": None, "sigma": 0.0, "solarise": False} | steps
    out = np.full((2, size, size, 3), 77, np.uint8)
    (ops or PixelOps("cubic", True)).make_view(out[0], image, ViewSteps(window=list(window), **settings))
    assert (out[1] == 77).all()
    return out[0]


def _whole(image: np.ndarray) -> tuple[int, int, int, int]:
    return 0, 0, image.shape[0], image.shape[1]


# ------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("kind", ["4:4:4", "4:2:2", "4:2:0", "grey"])
def test_decode__jpeg_as_pillow(make_photos: Callable, kind: str) -> None:
    ops = PixelOps("cubic", True)
    for encoded in make_photos(6, kind=kind).encoded:  # sizes vary, the buffer stays
        expected = _pillow(encoded)
        pixels = ops.decode(np.frombuffer(encoded, np.uint8), expected.shape[1], expected.shape[0])
        assert np.array_equal(pixels, expected)
    assert ops.seconds["decode"] > 0


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_decode__png_as_pillow(mode: str) -> None:
    encoded = _bytes(Image.fromarray(_noise(30, 47)).convert(mode), "PNG")
    assert np.array_equal(PixelOps("cubic", True).decode(encoded, 47, 30), _pillow(encoded))


def test_decode__progressive_and_orientation_tag() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    for options in ({"progressive": True}, {"exif": exif}):
        encoded = _bytes(Image.fromarray(_noise(30, 47)), "JPEG", **options)
        assert np.array_equal(PixelOps("cubic", True).decode(encoded, 47, 30), _pillow(encoded))


def test_decode__harmless_warning_as_pillow() -> None:
    """Libjpeg warns of bytes between blocks and end; DALI and Pillow take the image, and so must we."""
    whole = _bytes(Image.fromarray(_noise(30, 47)), "JPEG", quality=95).tobytes()
    encoded = np.frombuffer(whole[:-2] + bytes(range(1, 40)) + whole[-2:], np.uint8)
    assert np.array_equal(PixelOps("cubic", True).decode(encoded, 47, 30), _pillow(encoded))


def test_decode__undecodable() -> None:
    whole = _bytes(Image.fromarray(_noise(30, 47)), "JPEG").tobytes()
    png = _bytes(Image.fromarray(_noise(30, 47)), "PNG").tobytes()
    for data, width, reason in (
        (whole[: len(whole) // 2], 47, "past the end|end marker"),
        (whole, 46, "47 × 30 pixels; the index says 46 × 30"),
        (whole, 48, "47 × 30 pixels; the index says 48 × 30"),
        (png, 48, "47 × 30 pixels; the index says 48 × 30"),
        (png[:200] + png[-12:], 47, "."),
        (b"", 47, "neither a JPEG nor a PNG"),
        (b"GIF89a" + whole, 47, "neither a JPEG nor a PNG"),
    ):
        with pytest.raises(Undecodable, match=reason) as caught:
            PixelOps("cubic", True).decode(np.frombuffer(data, np.uint8), width, 30)
        assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------- resize


@INTERPOLATIONS
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [1, 28, 96, 224])
def test_make_view__cut_equals_torchvision(interpolation: str, antialias: bool, size: int) -> None:
    """Bit for bit; shrunk, enlarged, one pixel wide and as large as the image."""
    image = _noise(150, 201)
    ops = PixelOps(interpolation, antialias)
    windows = ((0, 0, 150, 201), (3, 5, 100, 120), (149, 200, 1, 1), (0, 7, 150, 1), (8, 0, 1, 201), (9, 11, 28, 28))
    for flip in (False, True):
        for window in windows:
            expected = functional.resized_crop(
                torch.from_numpy(image).permute(2, 0, 1),
                *window,
                [size, size],
                interpolation=_MODES[interpolation],
                antialias=antialias,
            )
            expected = (functional.hflip(expected) if flip else expected).permute(1, 2, 0).numpy()
            got = _view(image, window, size, ops, flip=flip)
            difference = np.abs(got.astype(int) - expected).max()
            # Without antialias torchvision computes bicubic in float32, so rounding differs.
            assert difference == 0 or (difference <= 1 and interpolation == "cubic" and not antialias)


@INTERPOLATIONS
@pytest.mark.parametrize(("height", "width"), [(375, 500), (333, 251), (1, 1), (2, 300), (28, 28), (90, 61)])
@pytest.mark.parametrize(("size", "fraction"), [(224, 0.875), (224, 1.0), (224, 0.95), (96, 0.7), (32, 0.9)])
def test_make_view__region_equals_pillow(
    make_photos: Callable, interpolation: str, height: int, width: int, size: int, fraction: float
) -> None:
    photo = Image.open(io.BytesIO(make_photos(1, kind="4:4:4", smallest=300, largest=301).encoded[0]))
    image = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC))
    plan = plan_center(size, crop_fraction=fraction, widths=np.array([width]), heights=np.array([height]))
    window = plan.groups[GLOBAL].windows[0, 0].tolist()
    top, left, window_height, window_width = window
    expected = Image.fromarray(image).resize(
        (size, size), _FILTERS[interpolation], box=(left, top, left + window_width, top + window_height)
    )
    got = _view(image, window, size, PixelOps(interpolation, True), is_cut=False)
    difference = np.abs(got.astype(int) - np.asarray(expected).astype(int))
    assert difference.mean() < 0.25
    assert difference.max() <= 8


@INTERPOLATIONS
def test_make_view__region_equals_torchvision_where_that_is_exact(make_photos: Callable, interpolation: str) -> None:
    """Resize the shorter side to 256, cut 224 from the centre: of 384 × 576 both are the same numbers."""
    photo = Image.open(io.BytesIO(make_photos(1, smallest=400, largest=401).encoded[0])).resize((576, 384))
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    resized = functional.resize(image, [256], interpolation=_MODES[interpolation], antialias=True)
    expected = functional.center_crop(resized, [224, 224]).permute(1, 2, 0).numpy()
    window = plan_center(224, crop_fraction=0.875, widths=np.array([576]), heights=np.array([384])).groups[GLOBAL]
    ops = PixelOps(interpolation, True)
    got = _view(np.asarray(photo), window.windows[0, 0].tolist(), 224, ops, is_cut=False)
    assert np.abs(got.astype(int) - expected).max() <= 1


@INTERPOLATIONS
@pytest.mark.parametrize("window", [(10.0, 20.0, 96.0, 96.0), (10.5, 20.25, 96.0, 96.0), (3.3, 4.7, 130.0, 61.5)])
def test_make_view__region_without_antialias(make_photos: Callable, interpolation: str, window: tuple) -> None:
    photo = Image.open(io.BytesIO(make_photos(1, smallest=150, largest=151).encoded[0]))
    top, left, height, width = window
    expected = photo.transform((64, 64), Image.Transform.EXTENT, (left, top, left + width, top + height),
                               _FILTERS[interpolation])  # fmt: skip
    got = _view(np.asarray(photo), window, 64, PixelOps(interpolation, False), is_cut=False)
    # Torch's bicubic filter is sharper (a = −0.75) than Pillow's (−0.5).
    assert np.abs(got.astype(int) - np.asarray(expected).astype(int)).mean() < 1.5


def test_make_view__region_of_the_whole_image_changes_nothing() -> None:
    image = _noise(28, 28)
    assert np.array_equal(_view(image, (0.0, 0.0, 28.0, 28.0), 28, is_cut=False), image)


# -------------------------------------------------------------------------------------------------------- filters


def _factors() -> np.ndarray:
    rng = np.random.default_rng(4)
    drawn = rng.uniform((0, 0, 0, -180), (2, 2, 2, 180), (40, 4))
    drawn[::5, 2] = 0
    return drawn.astype(np.float32).reshape(2, 20, 4)


def test_colour_matrices__are_those_of_colour_map() -> None:
    factors = _factors()
    matrices = colour_matrices(factors)
    assert matrices.shape == (2, 20, 3, 4) and matrices.dtype == np.float32
    for at in np.ndindex(2, 20):
        matrix, offset = colour_map(factors[at])
        assert np.allclose(matrices[at], np.column_stack((matrix, offset)), atol=1e-4)


def test_make_view__colours_as_the_reference() -> None:
    """Also far out of range, where values are cut off at 0 and 255."""
    image = _noise(64, 64)
    for factors, matrix in zip(_factors().reshape(-1, 4), colour_matrices(_factors()).reshape(-1, 3, 4), strict=True):
        linear, offset = colour_map(factors)
        expected = np.clip(image @ linear.T + offset, 0, 255)
        got = _view(image, _whole(image), 64, colour=matrix)
        assert np.abs(got - expected).max() <= 1
        if factors[2] == 0:
            assert np.ptp(got, axis=-1).max() <= 2


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.3, 0.5, 0.77, 1.0, 1.5, 2.0, 7.0, 64.0])
@pytest.mark.parametrize("size", [1, 2, 24, 65])
def test_make_view__blur_as_the_reference(sigma: float, size: int) -> None:
    """Black and white noise is the worst case; windows may be wider than the view."""
    image = (_noise(size, size) > 127).astype(np.uint8) * np.uint8(255)
    weights = blur_kernel(sigma)
    half = len(weights) // 2
    padded = np.pad(image.astype(float), ((half, half), (half, half), (0, 0)), mode="reflect")
    rows = sum(weight * padded[at : at + size] for at, weight in enumerate(weights))
    expected = sum(weight * rows[:, at : at + size] for at, weight in enumerate(weights))
    assert np.abs(_view(image, _whole(image), size, sigma=sigma) - expected).max() <= 0.51


def test_make_view__solarise_as_defined() -> None:
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    expected = np.where(image >= SOLARISE_FROM, 255 - image, image)
    assert np.array_equal(_view(image, _whole(image), 16, solarise=True), expected)


@pytest.mark.parametrize("chosen", range(16))
def test_make_view__steps_in_their_order(chosen: int) -> None:
    """Any of the four steps, one after the other, is what they are together."""
    image = _noise(40, 40)
    matrix = colour_matrices(np.array((1.3, 0.7, 1.5, 40), np.float32))
    steps = [{"flip": True}, {"colour": matrix}, {"sigma": 0.8}, {"solarise": True}]
    taken = [step for number, step in enumerate(steps) if chosen >> number & 1]
    expected = image
    for step in taken:
        expected = _view(expected, _whole(image), 40, **step)
    together = {name: value for step in taken for name, value in step.items()}
    before = image.copy()
    assert np.array_equal(_view(image, _whole(image), 40, **together), expected)
    assert np.array_equal(image, before)


def test_make_view__starts_no_threads() -> None:
    """The trainer's number of OpenMP threads would otherwise be started once for each thread of the pool."""
    program = """
import os, threading
import cv2, numpy as np, torch
from maestri.pipelines.pixel_ops import PixelOps, ViewSteps
torch.set_num_threads(8)
cv2.setNumThreads(1)
image, out, counts = np.zeros((1500, 2000, 3), np.uint8), np.zeros((700, 700, 3), np.uint8), []
def work():
    counts.append(len(os.listdir("/proc/self/task")))
    for interpolation, antialias in (("linear", True), ("cubic", True), ("linear", False), ("cubic", False)):
        ops = PixelOps(interpolation, antialias)
        for is_cut in (True, False):
            steps = ViewSteps([64, 64, 1400, 1400], is_cut, True, np.eye(3, 4, dtype=np.float32), 2.0, True)
            ops.make_view(out, image, steps)
    counts.append(len(os.listdir("/proc/self/task")))
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert counts[0] == counts[1], counts
assert torch.get_num_threads() == 8
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_cv2__has_the_calls_we_make() -> None:
    """A ``dst`` of another size or type would silently be replaced by a new array."""
    image, out = _noise(9, 9), np.empty((9, 9, 3), np.uint8)
    assert cv2.flip(image, 1, out) is out
    assert cv2.transform(image, np.eye(3, 4, dtype=np.float32), out) is out
