"""What is let through to a decoder, and what is not."""

import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maestri.pipelines.header import BadHeader, image_size


def _encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (40, 30), "white").save(buffer, kind, **options)
    return buffer.getvalue()


GOOD = _encoded("JPEG")
PROGRESSIVE = _encoded("JPEG", progressive=True)
FRAME = GOOD.index(b"\xff\xc0")
"""Where the frame header starts: 4 bytes on its precision, 5 its height and width, 9 its components."""


def _changed(data: bytes, at: int, put: bytes) -> bytes:
    return data[:at] + put + data[at + len(put) :]


def _with_scans(progressive: bytes, count: int) -> bytes:
    """Returns a progressive JPEG with its last scan so many times."""
    last = progressive.rindex(b"\xff\xda")
    return progressive[:last] + progressive[last:-2] * count + progressive[-2:]


def _png_of(width: int, height: int, bits: int, colour: int) -> bytes:
    png = _encoded("PNG")
    return _changed(png, 16, struct.pack(">IIBB", width, height, bits, colour))


@pytest.mark.parametrize(
    "encoded",
    [
        GOOD,
        _encoded("JPEG", "L"),
        _encoded("JPEG", progressive=True),
        _encoded("JPEG", subsampling="4:4:4", comment="a comment", exif=Image.Exif()),
        GOOD + b"\0\0trailing bytes",
        GOOD[:2] + b"\xff" + GOOD[2:],
        _encoded("PNG"),
        _encoded("PNG", "P"),
        _with_scans(PROGRESSIVE, 400),
    ],
)
def test_image_size__good(encoded: bytes) -> None:
    assert image_size(memoryview(encoded)) == (40, 30)


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "neither"),
        (b"\xff\xd8", "ends before"),
        (b"garbage" * 100, "neither"),
        (_encoded("GIF"), "neither"),
        (GOOD[:300], "past the end|ends before|end marker"),
        (GOOD[:-2], "end marker"),
        (GOOD[: len(GOOD) // 2 + 150], "past the end"),
        (GOOD[:-10], "end marker"),
        (_encoded("JPEG", "CMYK"), "4 components"),
        (_encoded("PNG")[:-4], "end marker"),
        (_encoded("PNG")[:20], "before its header"),
        (GOOD[:2] + b"\xff\xe0\0\1" + GOOD[2:], "past the end"),
        (GOOD[:2] + b"\xff\xda\0\2" + GOOD[2:], "0xda"),
        (GOOD[:2] + b"\0" + GOOD[2:], "no JPEG marker"),
        (_changed(GOOD, FRAME + 4, b"\x0c"), "of 12 bits"),
        (_changed(GOOD, FRAME + 5, b"\0\0"), "no sane size"),
        (_changed(GOOD, FRAME + 5, b"\x3e\x80\x3e\x80"), "16000 × 16000 pixels can't come out of"),
        (_changed(GOOD, FRAME + 5, b"\xff\xff\xff\xff"), "no sane size|can't come out"),
        (_changed(GOOD, FRAME + 1, b"\xc9"), "0xc9"),  # arithmetic coding
        (GOOD[:FRAME] + GOOD[FRAME : FRAME + 19] + GOOD[FRAME:], "0xc0"),  # a second frame
        (_with_scans(PROGRESSIVE, 501), "more than 500 scans"),
        (_png_of(40, 30, 16, 2), "16 bits"),
        (_png_of(40, 30, 8, 1), "colour type 1"),
        (_png_of(0, 30, 8, 2), "no sane size"),
        (_png_of(16000, 16000, 8, 2), "can't come out of"),
    ],
)
def test_image_size__bad(encoded: bytes, reason: str) -> None:
    with pytest.raises(BadHeader, match=reason):
        image_size(encoded)


@pytest.mark.parametrize("size", [(65500, 80), (3000, 2000), (1, 65500)])
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}])
def test_image_size__takes_the_plainest_large_image(size: tuple[int, int], options: dict[str, bool]) -> None:
    """One colour all over: nothing takes fewer bytes for its pixels."""
    for mode, kind, more in (("L", "JPEG", options), ("RGB", "JPEG", options), ("1", "PNG", {}), ("P", "PNG", {})):
        buffer = io.BytesIO()
        Image.new(mode, size).save(buffer, kind, **more)
        assert image_size(buffer.getvalue()) == size


@given(noise=st.binary(max_size=400), start=st.sampled_from([b"", b"\xff\xd8", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"]))
def test_image_size__any_bytes(noise: bytes, start: bytes) -> None:
    try:
        width, height = image_size(start + noise)
    except BadHeader:
        return
    assert width > 0
    assert height > 0


@given(at=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255))
def test_image_size__any_flipped_byte(at: int, value: int) -> None:
    damaged = bytearray(GOOD)
    damaged[at] = value
    try:
        image_size(damaged)
    except BadHeader:
        return
