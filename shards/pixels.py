"""Pixels on their way to a stored image: eight bits a channel, shrunk, encoded."""

import io
import math
from collections.abc import Callable, Iterator

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile

from maestri.shards.jpeg import JpegHeader

FULL_CHROMA_QUALITY = 95
"""From this JPEG quality on, chroma is not subsampled."""
_BAND_PIXELS = 1 << 20
"""Pixels that are worked on at a time where that takes many bytes for each."""
_SHARPNESS = 4
"""A JPEG decoded smaller than stored has at least so many times the pixels a side that are wanted."""


class NoRange(ValueError):
    """Pixels whose numbers don't say how bright they are; the reason is its text."""


def eight_bits(image: Image.Image) -> Image.Image:
    """Returns a grey or RGB image of 8 bits a channel, without anything else of the file's (profile, EXIF, comment).

    Raises:
        NoRange: floating-point pixels, or 32-bit ones outside of 0–65535.
    """
    if image.mode == "F":
        raise NoRange("floating-point pixels have no stated range")
    if image.mode.startswith("I"):
        return _from_sixteen_bits(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        found = Image.new("L" if image.mode in ("1", "L", "LA", "La") else "RGB", image.size)
        for top, band in _bands(image):
            found.paste(_on_white(band).convert(found.mode), (0, top))
        return found
    pixels = image.convert("L" if image.mode in ("1", "L") else "RGB")
    pixels.info.clear()
    return pixels


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    """Returns 0–65535 as 0–255, rounded."""
    lowest, highest = 65535, 0
    found = np.empty((image.height, image.width), np.uint8)
    for top, band in _bands(image):
        values = np.asarray(band, np.int64)
        lowest, highest = min(lowest, int(values.min())), max(highest, int(values.max()))
        found[top : top + band.height] = (values * 255 + 32767) // 65535
    if lowest < 0 or highest > 65535:
        raise NoRange(f"32-bit pixels from {lowest} to {highest} have no stated range; expected 0 to 65535")
    return Image.fromarray(found)


def _on_white(image: Image.Image) -> Image.Image:
    straight = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), straight)


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yields an image's rows from top to bottom, a few at a time, each time with the number of the first."""
    image.load()
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def shrunk_size(width: int, height: int, shorter: int) -> tuple[int, int]:
    """Returns the size with the shorter side reduced to ``shorter``; the same size where it is no longer than that."""
    if not 0 < shorter < min(width, height):
        return width, height
    longer = math.floor(max(width, height) * shorter / min(width, height) + 0.5)
    return (shorter, longer) if width < height else (longer, shorter)


def decode_for(data: bytes, header: JpegHeader, shorter: int) -> Image.Image:
    """Returns a plain JPEG's pixels, at a half, quarter or eighth of its size where four times ``shorter`` is left.

    Damage is not told.

    Raises:
        OSError: it cannot be decoded.
    """
    factor = max(f for f in (1, 2, 4, 8) if f == 1 or min(header.width, header.height) >= _SHARPNESS * f * shorter)
    try:
        return _image(
            simplejpeg.decode_jpeg(
                data,
                "GRAY" if len(header.channels) == 1 else "RGB",
                min_height=-(-header.height // factor),
                min_width=-(-header.width // factor),
                strict=False,
            )
        )
    except ValueError:  # it refuses odd headers even when it isn't strict
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return eight_bits(image)


def decode_tolerantly(data: bytes, open_image: Callable[[bytes], Image.Image]) -> Image.Image | None:
    """Returns what can be got out of a damaged image, at full size; None if that is nothing, or all of one colour.

    libjpeg-turbo fills missing blocks with grey, Pillow leaves missing rows black.
    """
    for way in (_decode_jpeg, lambda damaged: _decode_with_pillow(damaged, open_image)):
        try:
            pixels = way(data)
        except MemoryError:  # says nothing about the image
            raise
        except Exception:  # Pillow's formats raise nearly anything on damaged files
            continue
        if any(low != high for low, high in np.atleast_2d(pixels.getextrema())):
            return pixels
    return None


def _decode_jpeg(data: bytes) -> Image.Image:
    _, _, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    if space not in ("Gray", "YCbCr", "RGB"):
        raise ValueError(f"{space} is left to Pillow, which knows Adobe's inverted inks")
    return _image(simplejpeg.decode_jpeg(data, "GRAY" if space == "Gray" else "RGB", strict=False))


def decode_rare(data: bytes) -> Image.Image | None:
    """Returns the pixels of a JPEG that libjpeg-turbo decodes and Pillow does not (arithmetic coding), else None."""
    try:
        return _decode_jpeg(data)
    except ValueError:
        return None


def _decode_with_pillow(data: bytes, open_image: Callable[[bytes], Image.Image]) -> Image.Image:
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with open_image(data) as image:
            image.load()
            return eight_bits(image)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _image(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def encode(image: Image.Image, *, lossless: bool, quality: int) -> bytes:
    """Returns a grey or RGB image as PNG or JPEG."""
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=quality, subsampling=0 if quality >= FULL_CHROMA_QUALITY else 2)
    return buffer.getvalue()
