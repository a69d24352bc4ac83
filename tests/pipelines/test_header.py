"""What is let through to a decoder, and what is not."""

import io

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
    ],
)
def test_image_size__bad(encoded: bytes, reason: str) -> None:
    with pytest.raises(BadHeader, match=reason):
        image_size(encoded)


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
