"""What is stored of an image: its own bytes where every decoder takes them, else a JPEG of quality 100."""

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from maestri.shards.jpeg import read_header

KEPT, TRANSCODED, MENDED = 0, 1, 2
"""Values of the index column ``stored``."""

POLICY = {
    "kept": "8-bit grey or YCbCr JPEG, byte for byte; a missing end marker is added",
    "transcoded": "everything else: JPEG of quality 100, 4:4:4; alpha over white, 16 bits scaled to 8",
}
JPEG_QUALITY = 100
MAX_PIXELS = 1 << 28
"""What the data path decodes at most; workers set Pillow's own limit to it."""
MAX_SIDE = 65500
"""Pixels; libjpeg encodes no more."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
"""What Pillow may open: never a format that runs another program, as EPS does.  JPEG includes MPO."""
_ORIENTATION_TAG = 274
_END_MARKER = b"\xff\xd9"


class BadImage(Exception):
    """An image that cannot be stored; the reason is its text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredImage:
    """What goes into a shard."""

    data: bytes
    """A JPEG."""
    width: int
    """Pixels, without regard to orientation."""
    height: int
    """Pixels."""
    orientation: int
    """EXIF orientation of the source, 1–8."""
    stored: int
    """``KEPT``, ``TRANSCODED`` or ``MENDED``."""


def store(source: bytes | NDArray[np.uint8], *, check: Literal["decode", "header"] = "decode") -> StoredImage:
    """Returns what is stored of an image.

    Args:
        source: an image file's bytes, or grey pixels ``height width``, 0–255.
        check: ``decode`` decodes every image; ``header`` trusts a JPEG whose header parses and whose end is there.

    Raises:
        BadImage: it is empty, no image, damaged or of no sane size.
    """
    if isinstance(source, np.ndarray):
        return _transcode(Image.fromarray(source), orientation=1)
    if not source:
        raise BadImage("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF blocks are common and harmless
            return _store_file(source, check)
    except UnidentifiedImageError:
        raise BadImage(f"no known image format ({len(source)} bytes, starting {source[:4].hex(' ')})") from None
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # on damaged files Pillow's many formats raise nearly anything, struct.error to KeyError
        raise BadImage(" ".join(str(error).split()) or type(error).__name__) from None


def _store_file(source: bytes, check: str) -> StoredImage:
    with Image.open(io.BytesIO(source), formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage(f"{width} × {height} pixels is no sane size")
        orientation = _orientation(image)
        header = read_header(source)
        if header is None or header.is_rgb:
            return _transcode(image, orientation=orientation)
        if not header.has_end and not _is_whole(source):
            raise BadImage(f"cut short: {len(source)} bytes without an end marker")
        if check == "decode" and header.has_end:
            image.load()
        data = source if header.has_end else source + _END_MARKER
        stored = KEPT if header.has_end else MENDED
        return StoredImage(data=data, width=header.width, height=header.height, orientation=orientation, stored=stored)


def _is_whole(source: bytes) -> bool:
    """Returns whether a JPEG lacks its end marker and nothing else.

    Pillow refuses both.  Where all blocks are there, bytes behind them change no pixel; where some lack, they are read
    as blocks.  A progressive JPEG cut short between two scans would pass as well, so none does.
    """
    pixels = set()
    for filler in (b"\0", b"\x55"):
        filled = source.rstrip(b"\xff") + filler * 64 + _END_MARKER
        with Image.open(io.BytesIO(filled), formats=("JPEG",)) as image:
            if "progressive" in image.info:
                return False
            pixels.add(image.tobytes())
    return len(pixels) == 1


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block raises nearly anything, and means no orientation
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _transcode(image: Image.Image, *, orientation: int) -> StoredImage:
    if max(image.size) > MAX_SIDE:
        raise BadImage(f"{image.width} × {image.height} pixels; a JPEG has at most {MAX_SIDE} a side")
    pixels = _to_eight_bits(image)
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return StoredImage(
        data=buffer.getvalue(),
        width=pixels.width,
        height=pixels.height,
        orientation=orientation,
        stored=TRANSCODED,
    )


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Returns a grey or RGB image of 8 bits a channel, without anything else of the file's (profile, EXIF, comment)."""
    if image.mode == "F":
        raise BadImage("floating-point pixels have no stated range")
    if image.mode.startswith("I"):
        return _from_sixteen_bits(np.asarray(image, np.int64))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        straight = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        grey = image.mode in ("1", "L", "LA", "La")
        return Image.alpha_composite(white, straight).convert("L" if grey else "RGB")
    pixels = image.convert("L" if image.mode in ("1", "L") else "RGB")
    pixels.info.clear()
    return pixels


def _from_sixteen_bits(values: NDArray[np.int64]) -> Image.Image:
    """Returns 0–65535 as 0–255, rounded."""
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest > 65535:
        raise BadImage(f"32-bit pixels from {lowest} to {highest} have no stated range; expected 0 to 65535")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
