"""The part of a JPEG before its pixels, read as strictly as the data path reads it."""

import struct
from dataclasses import dataclass

_START = b"\xff\xd8"
_END = b"\xff\xd9"
_APP14, _START_OF_SCAN = 0xEE, 0xDA
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
"""Baseline, extended and progressive: what libjpeg-turbo and nvJPEG both decode."""
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_NO_LENGTH = (0x01, *range(0xD0, 0xD8))


@dataclass(frozen=True, kw_only=True, slots=True)
class JpegHeader:
    """What a frame header and the segments before it say."""

    width: int
    """Pixels, as stored."""
    height: int
    """Pixels, as stored."""
    is_rgb: bool
    """Three channels stored as RGB rather than YCbCr."""
    has_end: bool
    """Whether an end marker stands behind the frame header; bytes after it are common and harmless."""


def read_header(data: bytes) -> JpegHeader | None:
    """Returns the header of an 8-bit Huffman-coded JPEG of one or three channels; None for anything else."""
    if data[:2] != _START:
        return None
    at, adobe_transform = 2, -1
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF or marker in _NO_LENGTH:
            at += 1 if marker == 0xFF else 2
            continue
        length = data[at + 2] << 8 | data[at + 3]
        if length < 2 or at + 2 + length > len(data) or marker in _OTHER_FRAMES or marker == _START_OF_SCAN:
            return None
        if marker == _APP14 and length >= 14 and data[at + 4 : at + 9] == b"Adobe":
            adobe_transform = data[at + 15]
        if marker in _HUFFMAN_FRAMES:
            return _frame(data, at, length, adobe_transform)
        at += 2 + length
    return None


def _frame(data: bytes, at: int, length: int, adobe_transform: int) -> JpegHeader | None:
    """Reads the frame header at byte ``at``."""
    if length < 8:
        return None
    precision, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
    if precision != 8 or channels not in (1, 3) or length != 8 + 3 * channels or not width or not height:
        return None
    ids = data[at + 10 : at + 10 + 3 * channels : 3]
    is_rgb = channels == 3 and (adobe_transform == 0 or (adobe_transform < 0 and ids == b"RGB"))
    return JpegHeader(width=width, height=height, is_rgb=is_rgb, has_end=data.rfind(_END, at + 2 + length) >= 0)
