"""What is stored of an image: its own bytes where every decoder takes them, else a new JPEG, or a PNG if asked."""

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from maestri.shards.jpeg import JpegHeader, NotPlain, parse_header, read_header
from maestri.shards.jpeg_damage import MAX_SCANS, count_scans, find_damage
from maestri.shards.pixels import (
    decode_for,
    decode_rare,
    decode_tolerantly,
    eight_bits,
    encode,
    shrunk_size,
)
from maestri.shards.png import find_png_damage, is_plain_png

KEPT, TRANSCODED, MENDED, FIXED, LOSSLESS, RESIZED = range(6)
"""Values of the index column ``stored``: the source's bytes; a JPEG made of another kind of image; the source's bytes
and an end marker; what could be got out of a damaged image; a PNG, the source's or a new one; a smaller image."""

MAX_PIXELS = 1 << 28
"""What the data path decodes at most; workers set Pillow's own limit to it."""
MAX_IMAGE = 1 << 30
"""Bytes of a file, or of an array; what is larger is no image, whatever its name, and is not read."""
MAX_SIDE = 65500
"""Pixels; libjpeg encodes no more."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
"""What Pillow may open: never a format that runs another program, as EPS does.  JPEG includes MPO."""
_ORIENTATION_TAG = 274
_JPEG_START, _END_MARKER = b"\xff\xd8", b"\xff\xd9"


class BadImage(Exception):
    """An image that cannot be stored; the reason is its text."""


def require_size(size: int) -> None:
    """Raises BadImage where so many bytes are no image: a source asks before it reads."""
    if size > MAX_IMAGE:
        raise BadImage(f"{size} bytes, and no image has more than {MAX_IMAGE}")


class _TooCostly(BadImage):
    """An image that is not decoded, whatever might be got out of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredImage:
    """What goes into a shard."""

    data: bytes
    """A JPEG or PNG."""
    width: int
    """Pixels, without regard to orientation."""
    height: int
    """Pixels."""
    orientation: int
    """EXIF orientation of the source, 1–8."""
    stored: int
    """``KEPT``, ``TRANSCODED``, ``MENDED``, ``FIXED``, ``LOSSLESS`` or ``RESIZED``."""
    extension: Literal["jpg", "png"] = "jpg"
    """What ``data`` is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Form:
    """What a new image looks like."""

    lossless: bool
    resize_shorter: int
    quality: int


def store(
    source: bytes | NDArray[np.uint8],
    *,
    check: Literal["decode", "header"] = "decode",
    mend: bool = False,
    lossless: bool = False,
    resize_shorter: int = 0,
    quality: int = 100,
) -> StoredImage:
    """Returns what is stored of an image.

    Args:
        source: an image file's bytes, or pixels: grey ``height width`` or RGB ``height width 3``, 0–255.
        check: ``decode`` decodes every image; ``header`` trusts a JPEG or PNG whose header parses and that has an end.
        mend: of a damaged image, store what a tolerant decoder makes of it, unless that is one colour throughout.
        lossless: keep a PNG of 8-bit grey or RGB as it is, and make a PNG of all that would become a JPEG otherwise;
            JPEGs that are damaged or resized still become JPEGs.
        resize_shorter: reduce the shorter side to so many pixels; 0 for never.  Smaller images stay as they are.
        quality: of new JPEGs, 1–100; below 95 their chroma is subsampled 4:2:0.

    Raises:
        BadImage: it is empty, no image, damaged or of no sane size.
    """
    form = _Form(lossless=lossless, resize_shorter=resize_shorter, quality=quality)
    if isinstance(source, np.ndarray):
        is_image = source.dtype == np.uint8 and source.size and source.shape[2:] in ((), (3,)) and source.ndim > 1
        if not is_image:
            raise BadImage(f"an array of {source.dtype} {source.shape} is no image")
        return _encoded(Image.fromarray(source), 1, form)
    if not source:
        raise BadImage("the file is empty")
    try:
        return _store_file(source, check, form)
    except BadImage as error:
        if mend and not isinstance(error, _TooCostly) and (fixed := _fixed(source, form)):
            return fixed
        raise


def is_whole_jpeg(source: bytes) -> bool:
    """Returns whether a file's bytes are a plain JPEG in which decoding finds no damage.

    Of such bytes, ``store`` makes the same with ``check="header"`` as with ``check="decode"``.
    """
    header = read_header(source)
    if header is None or header.is_rgb or not header.has_end or header.width * header.height > MAX_PIXELS:
        return False
    return count_scans(source, header) <= MAX_SCANS and not find_damage(source, header)


def _store_file(source: bytes, check: str, form: _Form) -> StoredImage:
    why_not_plain = "no JPEG"
    if source[:2] == _JPEG_START:
        header = None
        try:
            header = parse_header(source)
        except NotPlain as error:
            why_not_plain = str(error)
        if (num_scans := count_scans(source, header)) > MAX_SCANS:
            raise _TooCostly(f"{num_scans} scans, each of which costs a decoder a pass; expected up to {MAX_SCANS}")
        if header is not None and not header.is_rgb:
            return _store_jpeg(source, header, check, form)
        if damage := find_damage(source, None):
            raise BadImage(damage)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF blocks are common and harmless
            return _store_other(source, check, form)
    except UnidentifiedImageError:
        if source[:3] == _JPEG_START + b"\xff":
            raise BadImage(f"a JPEG that nothing here decodes: {why_not_plain}") from None
        raise BadImage(f"no known image format ({len(source)} bytes, starting {source[:4].hex(' ')})") from None
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # on damaged files Pillow's many formats raise nearly anything, struct.error to KeyError
        raise BadImage(" ".join(str(error).split()) or type(error).__name__) from None


def _store_jpeg(source: bytes, header: JpegHeader, check: str, form: _Form) -> StoredImage:
    """Stores a plain JPEG."""
    _check_size(header.width, header.height)
    if not header.has_end and header.is_progressive:
        raise BadImage(f"cut short: {len(source)} bytes without an end marker, and any scan may be missing")
    data = source if header.has_end else source.rstrip(b"\xff") + _END_MARKER
    if check == "decode" or not header.has_end:
        damage = find_damage(data, header)
        if damage and not header.has_end:
            raise BadImage(f"cut short: {len(source)} bytes without an end marker")
        if damage:
            raise BadImage(damage)
    if shrunk_size(header.width, header.height, form.resize_shorter) != (header.width, header.height):
        try:
            pixels = decode_for(data, header, form.resize_shorter)
        except MemoryError:
            raise
        except Exception as error:  # a header that was trusted
            raise BadImage(" ".join(str(error).split()) or type(error).__name__) from None
        return _encoded(pixels, header.orientation, form, size=(header.width, header.height), is_jpeg=True)
    return StoredImage(
        data=data,
        width=header.width,
        height=header.height,
        orientation=header.orientation,
        stored=KEPT if header.has_end else MENDED,
    )


def _store_other(source: bytes, check: str, form: _Form) -> StoredImage:
    """Stores whatever Pillow opens."""
    with _open(source) as image:
        _check_size(*image.size)
        stays = form.lossless and shrunk_size(*image.size, form.resize_shorter) == image.size
        stays = stays and is_plain_png(source, image)
        if image.format == "PNG" and not (stays and check == "header") and (damage := find_png_damage(source)):
            raise BadImage(damage)
        if stays:
            if check == "decode":
                image.load()
            return StoredImage(
                data=source,
                width=image.width,
                height=image.height,
                orientation=_orientation(image),
                stored=LOSSLESS,
                extension="png",
            )
        try:
            image.load()
        except OSError:
            rare = decode_rare(source) if image.format == "JPEG" else None
            if rare is None:
                raise
            return _encoded(rare, _orientation(image), form)
        # Only now: loading a TIFF, Pillow turns it and forgets its orientation.
        return _encoded(eight_bits(image), _orientation(image), form)


def _open(source: bytes) -> Image.Image:
    return Image.open(io.BytesIO(source), formats=FORMATS)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} × {height} pixels is no sane size")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block raises nearly anything, and means no orientation
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _fixed(source: bytes, form: _Form) -> StoredImage | None:
    """Returns what can be got out of a damaged image, None if that is nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _open(source) as image:
                _check_size(*image.size)
                orientation = _orientation(image)
            pixels = decode_tolerantly(source, _open)
            if pixels is None:
                return None
            return _encoded(pixels, orientation, form, stored=FIXED, is_jpeg=source[:2] == _JPEG_START)
    except MemoryError:  # says nothing about the image
        raise
    except Exception:  # the image stays as bad as it was found to be
        return None


def _encoded(
    image: Image.Image,
    orientation: int,
    form: _Form,
    *,
    size: tuple[int, int] | None = None,
    stored: int | None = None,
    is_jpeg: bool = False,
) -> StoredImage:
    """Returns a new image.

    Args:
        image: 8-bit grey or RGB.
        orientation: of the source.
        form: what the new image looks like.
        size: of the source, if ``image`` was decoded smaller.
        stored: what is said of it; None for what its form says.
        is_jpeg: whether the source was one, which a PNG would not make better.
    """
    size = size or image.size
    target = shrunk_size(*size, form.resize_shorter)
    pixels = image if target == image.size else image.resize(target, Image.Resampling.LANCZOS)
    lossless = form.lossless and not is_jpeg
    if max(pixels.size) > MAX_SIDE and not lossless:
        raise BadImage(f"{pixels.width} × {pixels.height} pixels; a JPEG has at most {MAX_SIDE} a side")
    if stored is None:
        stored = RESIZED if target != size else LOSSLESS if lossless else TRANSCODED
    return StoredImage(
        data=encode(pixels, lossless=lossless, quality=form.quality),
        width=pixels.width,
        height=pixels.height,
        orientation=orientation,
        stored=stored,
        extension="png" if lossless else "jpg",
    )
