"""What Pillow does not tell of a PNG: whether it is whole, and whether any other decoder takes it."""

import zlib

from PIL import Image

_START, _END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
_GREY_OR_RGB = (0, 2)
"""Colour types without palette and alpha."""


def is_plain_png(source: bytes, image: Image.Image) -> bool:
    """Returns whether it is an 8-bit PNG, grey or RGB, without transparency, animation and bytes behind its end.

    Args:
        source: the file.
        image: what Pillow opened it as.
    """
    return (
        image.format == "PNG"
        and source[:8] == _START
        and source[-12:] == _END
        and source[24] == 8
        and source[25] in _GREY_OR_RGB
        and "transparency" not in image.info
        and not getattr(image, "is_animated", False)
    )


def find_png_damage(data: bytes) -> str:
    """Returns what is damaged in a PNG by its checksums, empty if nothing is; Pillow decodes some that miss data.

    Checksums of chunks that decoders may skip don't count, nor does a missing end where all else is there.
    """
    if data[:8] != _START:
        return "no PNG"
    at, view = 8, memoryview(data)
    while at < len(data):
        length, kind = int.from_bytes(view[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data):
            return f"the PNG's chunk at byte {at} runs past the end"
        is_critical = not kind[0] & 0x20
        if is_critical and zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            return f"the PNG's chunk at byte {at} has a wrong checksum"
        if kind == b"IEND":
            return ""
        at = end
    return ""
