"""What is stored of an image: its own bytes where every decoder takes them, else a JPEG of quality 100."""

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

KEPT, TRANSCODED, MENDED = 0, 1, 2
"""Values of the index column ``stored``."""

POLICY = {
    "kept": "8-bit grey or YCbCr JPEG, byte for byte; a missing end marker is added",
    "transcoded": "everything else: JPEG of quality 100, 4:4:4; alpha over white, 16 bits scaled to 8",
}
JPEG_QUALITY = 100
MAX_PIXELS = 1 << 28
_ORIENTATION_TAG = 274
_END_MARKER = b"\xff\xd9"
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    IndexError,
    Warning,
    Image.DecompressionBombError,
)
"""What Pillow raises on damaged files, over its many formats."""


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
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _store_file(source, check)
    except UnidentifiedImageError:
        raise BadImage(f"no known image format ({len(source)} bytes, starting {source[:4].hex(' ')})") from None
    except BadImage:
        raise
    except _DECODE_ERRORS as error:
        raise BadImage(" ".join(str(error).split()) or type(error).__name__) from None


def _store_file(source: bytes, check: str) -> StoredImage:
    with Image.open(io.BytesIO(source)) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage(f"{width} × {height} pixels is no sane size")
        orientation = _orientation(image)
        if not _is_plain_jpeg(image):
            return _transcode(image, orientation=orientation)
        ends = source.rfind(_END_MARKER, len(source) // 2) >= 0
        if check == "decode" or not ends:
            image.load()  # without its end marker a JPEG may still be whole
        data = source if ends else source + _END_MARKER
        stored = KEPT if ends else MENDED
        return StoredImage(data=data, width=width, height=height, orientation=orientation, stored=stored)


def _is_plain_jpeg(image: Image.Image) -> bool:
    """Returns whether every decoder here reads it: grey, or three channels that are YCbCr."""
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return False
    is_rgb_coded = image.mode == "RGB" and image.info.get("adobe_transform") == 0
    return not is_rgb_coded


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except (*_DECODE_ERRORS, KeyError, AttributeError):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _transcode(image: Image.Image, *, orientation: int) -> StoredImage:
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
    """Returns a grey or RGB image of 8 bits a channel."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        top = 65535.0 if values.max() > 255 or image.mode.startswith("I;16") else 255.0
        return Image.fromarray(np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8))
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, coloured).convert("L" if image.mode == "LA" else "RGB")
    return image.convert("RGB")
