"""A look at encoded images before a decoder sees them: a header that does not parse can bring DALI's process down."""

import struct

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_START_OF_SCAN = 0xDA
_FRAMES = {0xC0, 0xC1, 0xC2}
"""Baseline, extended and progressive Huffman coding: what libjpeg-turbo and nvJPEG decode."""
_OTHER_FRAMES = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_NO_LENGTH = {0x01, *range(0xD0, 0xD8)}
_MAX_PIXELS = 1 << 28


class BadHeader(ValueError):
    """Encoded bytes that are not a whole 8-bit grey or YCbCr JPEG, nor an 8-bit PNG; the reason is its text."""


def image_size(encoded: bytes | memoryview) -> tuple[int, int]:
    """Returns the width and height that a JPEG's or PNG's header states, in pixels, after checking header and end.

    Raises:
        BadHeader: the bytes are something else, cut short, or of a kind we don't decode.
    """
    data = memoryview(encoded)
    if bytes(data[:2]) == _SOI:
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
    """Walks the markers up to the frame header; looks for the end marker behind it."""
    at, size = 2, len(data)
    while at + 4 <= size:
        if data[at] != 0xFF:
            raise BadHeader(f"no JPEG marker at byte {at}")
        marker = data[at + 1]
        if marker == 0xFF or marker in _NO_LENGTH:
            at += 1 if marker == 0xFF else 2
            continue
        length = data[at + 2] << 8 | data[at + 3]
        if length < 2 or at + 2 + length > size:
            raise BadHeader(f"the JPEG's segment at byte {at} runs past the end")
        if marker in _FRAMES:
            return _frame_size(data, at, length)
        if marker in _OTHER_FRAMES or marker == _START_OF_SCAN:
            raise BadHeader(f"JPEG marker {marker:#x} at byte {at} instead of a baseline or progressive frame")
        at += 2 + length
    raise BadHeader("the JPEG ends before its frame header")


def _frame_size(data: memoryview, at: int, length: int) -> tuple[int, int]:
    """Reads the frame header at byte ``at``."""
    if length < 8:
        raise BadHeader(f"the JPEG's frame header is {length} bytes long")
    precision, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
    if precision != 8 or components not in (1, 3) or length != 8 + 3 * components:
        raise BadHeader(f"{components} components of {precision} bits; expected 1 or 3 of 8")
    # Bytes behind the end marker are common and harmless; an end marker in a thumbnail stands before the frame header.
    if bytes(data[-2:]) != _EOI and bytes(data[at + 2 + length :]).rfind(_EOI) < 0:
        raise BadHeader("the JPEG has no end marker")
    return width, height


def _png_size(data: memoryview) -> tuple[int, int]:
    """Reads a PNG's first chunk."""
    if len(data) < 45 or bytes(data[12:16]) != b"IHDR":
        raise BadHeader("the PNG ends before its header")
    if bytes(data[-8:]) != _PNG_END:
        raise BadHeader("the PNG has no end marker")
    width, height = struct.unpack_from(">II", data, 16)
    if data[24] > 8:
        raise BadHeader(f"a PNG of {data[24]} bits; expected at most 8")
    return width, height
