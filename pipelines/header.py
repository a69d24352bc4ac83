"""A look at encoded images before a decoder sees them: a header that does not parse can bring DALI's process down."""

import struct

from maestri.shards.jpeg import NotPlain, parse_header
from maestri.shards.jpeg_damage import MAX_SCANS, count_scans

_JPEG_START = b"\xff\xd8"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_MAX_PIXELS = 1 << 28
_INFLATED = 1032
"""Bytes that deflate makes of one, at most."""
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


class BadHeader(ValueError):
    """Encoded bytes that are not a whole 8-bit grey or YCbCr JPEG, nor an 8-bit PNG; the reason is its text."""


def image_size(encoded: bytes | memoryview) -> tuple[int, int]:
    """Returns the width and height that a JPEG's or PNG's header states, in pixels, after checking header and end.

    Raises:
        BadHeader: the bytes are something else, cut short, or of a kind we don't decode.
    """
    data = memoryview(encoded)
    if bytes(data[:2]) == _JPEG_START:
        width, height = _jpeg_size(data)
    elif bytes(data[:8]) == _PNG_START:
        width, height = _png_size(data)
    else:
        raise BadHeader(
            f"neither a JPEG nor a PNG ({len(data)} bytes, starting {bytes(data[:4]).hex(' ') or 'nowhere'})"
        )
    if width == 0 or height == 0 or width * height > _MAX_PIXELS:
        raise BadHeader(f"{width} × {height} pixels is no sane size")
    return width, height


def _jpeg_size(data: memoryview) -> tuple[int, int]:
    try:
        header = parse_header(data)
    except NotPlain as error:
        raise BadHeader(str(error)) from None
    if not header.has_end:
        raise BadHeader("the JPEG has no end marker")
    if header.is_progressive and count_scans(bytes(data), header) > MAX_SCANS:
        raise BadHeader(f"a JPEG of more than {MAX_SCANS} scans")
    return header.width, header.height


def _png_size(data: memoryview) -> tuple[int, int]:
    """Reads a PNG's first chunk."""
    if len(data) < 45 or bytes(data[12:16]) != b"IHDR":
        raise BadHeader("the PNG ends before its header")
    if bytes(data[-8:]) != _PNG_END:
        raise BadHeader("the PNG has no end marker")
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    if bits not in (1, 2, 4, 8) or colour not in _PNG_CHANNELS:
        raise BadHeader(f"a PNG of {bits} bits and colour type {colour}; expected at most 8 bits")
    if height * (width * bits * _PNG_CHANNELS[colour] // 8) > _INFLATED * len(data):
        raise BadHeader(f"{width} × {height} pixels can't come out of {len(data)} bytes")
    return width, height
