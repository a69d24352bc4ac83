"""The part of a JPEG before its pixels, read as strictly as decoders on the data path need it."""

import struct
from dataclasses import dataclass

_START, _END = b"\xff\xd8", b"\xff\xd9"
_HUFFMAN, _QUANTISATION, _RESTART, _START_OF_SCAN = 0xC4, 0xDB, 0xDD, 0xDA
_EXIF, _ADOBE = 0xE1, 0xEE
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
"""Baseline, extended and progressive: what libjpeg-turbo and nvJPEG both decode."""
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC8, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_SEGMENTS = frozenset((_HUFFMAN, _QUANTISATION, _RESTART, 0xDC, 0xFE, *range(0xE0, 0xF0)))
"""What may stand before the first scan; libjpeg refuses other markers."""
_NO_LENGTH = (0x01, *range(0xD0, 0xD8))
_ORIENTATION_TAG, _SHORT, _LONG = 274, 3, 4
_PIXELS_PER_BYTE = 1024
"""At most.  A block takes a bit or more, and even the thinnest sampling (1 × 1, 4 × 1, 1 × 4) has nine blocks for 1024
pixels.  So a few bytes can't have gigabytes of pixels made for them."""


class NotPlain(ValueError):
    """Not a JPEG that every decoder takes; the reason is its text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JpegHeader:
    """What the segments before the first scan say."""

    width: int
    """Pixels, as stored."""
    height: int
    """Pixels, as stored."""
    channels: bytes
    """The channels' ids, one or three."""
    is_rgb: bool
    """Three channels stored as RGB rather than YCbCr."""
    is_progressive: bool
    """Whether each scan only adds to what others said."""
    orientation: int
    """EXIF's, 1–8; 1 where there is none or it cannot be read."""
    scan_at: int
    """Where the first scan's header starts."""
    has_end: bool
    """Whether an end marker stands behind the first scan's header; bytes after it are common and harmless."""


def read_header(data: bytes | memoryview) -> JpegHeader | None:
    """Returns the header of an 8-bit Huffman-coded JPEG of one or three channels; None for anything else."""
    try:
        return parse_header(data)
    except NotPlain:
        return None


def parse_header(data: bytes | memoryview) -> JpegHeader:
    """Returns the header of an 8-bit Huffman-coded JPEG of one or three channels.

    Every byte up to the first scan must belong to a segment that libjpeg knows, and tables must be there: what DALI's
    and nvJPEG's own parsers make of anything else is not worth finding out.

    Raises:
        NotPlain: it is something else, or cut short; a missing end marker alone is no reason.
    """
    if data[:2] != _START:
        raise NotPlain("no JPEG")
    at, size = 2, len(data)
    frame_at = adobe_transform = -1
    orientation, tables = 0, set()
    while at + 4 <= size:
        if data[at] != 0xFF:
            raise NotPlain(f"no JPEG marker at byte {at}")
        marker = data[at + 1]
        if marker == 0xFF or marker in _NO_LENGTH:
            at += 1 if marker == 0xFF else 2
            continue
        length = data[at + 2] << 8 | data[at + 3]
        end = at + 2 + length
        if length < 2 or end > size:
            raise NotPlain(f"the JPEG's segment at byte {at} runs past the end")
        if marker in _SEGMENTS:
            tables.add(marker)
            if marker == _EXIF and not orientation and data[at + 4 : at + 10] == b"Exif\0\0":
                orientation = exif_orientation(bytes(data[at + 10 : end]))
            elif marker == _ADOBE and length >= 14 and data[at + 4 : at + 9] == b"Adobe":
                adobe_transform = data[at + 15]
        elif marker in _HUFFMAN_FRAMES and frame_at < 0:
            frame_at = at
        elif marker == _START_OF_SCAN and frame_at >= 0:
            break
        elif marker in _OTHER_FRAMES or marker in (_START_OF_SCAN, *_HUFFMAN_FRAMES):
            raise NotPlain(f"JPEG marker {marker:#x} at byte {at} instead of one baseline or progressive frame")
        else:
            raise NotPlain(f"unknown JPEG marker {marker:#x} at byte {at}")
        at = end
    else:
        raise NotPlain(f"the JPEG ends before its {'frame' if frame_at < 0 else 'scan'} header")
    if not {_HUFFMAN, _QUANTISATION} <= tables:
        raise NotPlain("the JPEG has no tables before its first scan")
    width, height, channels = _frame(data, frame_at)
    if width * height > _PIXELS_PER_BYTE * size:
        raise NotPlain(f"{width} × {height} pixels can't come out of the JPEG's {size} bytes")
    _check_scan(data, at, len(channels))
    return JpegHeader(
        width=width,
        height=height,
        channels=channels,
        # A JFIF marker beside Adobe's means YCbCr to libjpeg; to be RGB by either is enough to be no plain one.
        is_rgb=len(channels) == 3 and (adobe_transform == 0 or (adobe_transform < 0 and channels == b"RGB")),
        is_progressive=data[frame_at + 1] == 0xC2,
        orientation=orientation or 1,
        scan_at=at,
        has_end=data[-2:] == _END or bytes(data[end:]).rfind(_END) >= 0,
    )


def _frame(data: bytes | memoryview, at: int) -> tuple[int, int, bytes]:
    """Returns width, height and channel ids of the frame header at byte ``at``."""
    length = data[at + 2] << 8 | data[at + 3]
    if length < 8:
        raise NotPlain(f"the JPEG's frame header is {length} bytes long")
    precision, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
    if precision != 8 or channels not in (1, 3) or length != 8 + 3 * channels:
        raise NotPlain(f"{channels} components of {precision} bits; expected 1 or 3 of 8")
    if width == 0 or height == 0:
        raise NotPlain(f"{width} × {height} pixels is no sane size")
    of_each = bytes(data[at + 10 : at + 10 + 3 * channels])
    for sampling, table in zip(of_each[1::3], of_each[2::3], strict=True):
        if not (1 <= sampling >> 4 <= 4 and 1 <= sampling & 15 <= 4 and table <= 3):
            raise NotPlain("the JPEG's frame header has impossible sampling or tables")
    return width, height, of_each[::3]


def _check_scan(data: bytes | memoryview, at: int, channels: int) -> None:
    length, in_scan = data[at + 2] << 8 | data[at + 3], data[at + 4]
    if length != 6 + 2 * in_scan or not 1 <= in_scan <= channels:
        raise NotPlain(f"the JPEG's scan header has {length} bytes for {in_scan} components")


def exif_orientation(block: bytes) -> int:
    """Returns the orientation in an EXIF block (a TIFF header and what follows), 1 for none, out of range or damaged.

    XMP may hold one as well; DALI and torchvision don't look there, so neither do we.
    """
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None or len(block) < 8:
        return 1
    magic, start = struct.unpack_from(order + "HI", block, 2)
    if magic != 42 or start + 2 > len(block):
        return 1
    (count,) = struct.unpack_from(order + "H", block, start)
    found = 1
    for at in range(start + 2, min(start + 2 + 12 * count, len(block) - 11), 12):
        tag, kind, values = struct.unpack_from(order + "HHI", block, at)
        if tag == _ORIENTATION_TAG:
            is_number = kind in (_SHORT, _LONG) and values == 1
            found = struct.unpack_from(order + ("H" if kind == _SHORT else "I"), block, at + 8)[0] if is_number else 1
    return found if 1 <= found <= 8 else 1
