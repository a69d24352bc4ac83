import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maestri.shards.jpeg import NotPlain, exif_orientation, parse_header, read_header


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"comment": b"\xff\xd9 x"}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_read_header__of_what_pillow_writes(make_jpeg: Callable[..., bytes], mode: str, options: dict) -> None:
    header = read_header(make_jpeg(31, 17, mode, **options))
    assert header is not None
    assert (header.width, header.height, header.is_rgb, header.has_end) == (31, 17, False, True)


def test_read_header__knows_rgb_and_missing_ends(make_jpeg: Callable[..., bytes]) -> None:
    rgb = read_header(make_jpeg(keep_rgb=True))
    cut = read_header(make_jpeg()[:-2])
    assert rgb is not None and rgb.is_rgb
    assert cut is not None and not cut.has_end


def test_read_header__refuses_other_kinds(encode: Callable[..., bytes]) -> None:
    assert read_header(encode(Image.new("CMYK", (8, 8)), "JPEG")) is None
    assert read_header(encode(Image.new("RGB", (8, 8)), "PNG")) is None
    assert read_header(b"") is None


@given(at=st.integers(0, 700), value=st.integers(0, 255), length=st.integers(0, 900))
def test_read_header__survives_damage(make_jpeg: Callable[..., bytes], at: int, value: int, length: int) -> None:
    data = bytearray(make_jpeg())
    data[at % len(data)] = value
    header = read_header(bytes(data[:length]))
    assert header is None or header.width > 0


def _exif(order: str, entries: list[bytes], start: int = 8) -> bytes:
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, start) + bytes(start - 8)
    return head + struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_orientation__is_pillows(order: str) -> None:
    other = struct.pack(order + "HHIHH", 271, 3, 1, 9, 0)
    for value in range(12):
        short = struct.pack(order + "HHIHH", 274, 3, 1, value, 0)
        long = struct.pack(order + "HHII", 274, 4, 1, value)
        for entries, start in (([short], 8), ([other, long, other], 26), ([other, short], 9), ([other], 8), ([], 8)):
            block = _exif(order, entries, start)
            assert exif_orientation(block) == _pillows(block)


@settings(max_examples=500)
@given(block=st.binary(max_size=60), data=st.data())
def test_exif_orientation__survives_anything(block: bytes, data: st.DataObject) -> None:
    assert 1 <= exif_orientation(block) <= 8
    damaged = bytearray(_exif("<", [struct.pack("<HHIHH", 274, 3, 1, 6, 0)] * 3) + block)
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    assert 1 <= exif_orientation(bytes(damaged[: data.draw(st.integers(0, len(damaged)))])) <= 8


def _pillows(block: bytes) -> int:
    exif = Image.Exif()
    exif.load(b"Exif\0\0" + block)
    value = exif.get(274, 1)
    return value if 1 <= value <= 8 else 1


def test_parse_header__reads_orientation_and_scan(make_jpeg: Callable[..., bytes]) -> None:
    exif = Image.Exif()
    exif[274] = 6
    data = make_jpeg(exif=exif, progressive=True)
    header = parse_header(memoryview(data))
    assert (header.orientation, header.is_progressive, header.channels) == (6, True, b"\1\2\3")
    assert data[header.scan_at : header.scan_at + 2] == b"\xff\xda"
    assert header == parse_header(data)


def _without(data: bytes, marker: int) -> bytes:
    parts, at = [data[:2]], 2
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        parts += [data[at:end]] if data[at + 1] != marker else []
        at = end
    return b"".join([*parts, data[at:]])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: _without(data, 0xC4), "no tables"),
        (lambda data: _without(data, 0xDB), "no tables"),
        (lambda data: _without(data, 0xC0), "0xda"),
        (lambda data: data.replace(b"\xff\xc0", b"\xff\xc9", 1), "0xc9"),
        (lambda data: data.replace(b"\xff\xc0", b"\xff\x02", 1), "unknown JPEG marker 0x2"),
        (lambda data: data.replace(b"\x03\x01\x22\0", b"\x03\x01\x52\0", 1), "impossible sampling"),
        (lambda data: data.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c", 1), "3 components of 12 bits"),
        (lambda data: data.replace(b"\0\x10\0\x18\x03", b"\0\0\0\x18\x03", 1), "24 × 0 pixels"),
        (lambda data: data.replace(b"\xff\xda\0\x0c\x03", b"\xff\xda\0\x0c\x04", 1), "scan header"),
        (lambda data: data[:2] + b"\xff\xd8\0\2" + data[2:], "unknown JPEG marker 0xd8"),
        (lambda data: data[: data.index(b"\xff\xda")], "before its scan header"),
    ],
)
def test_parse_header__says_why_not(
    make_jpeg: Callable[..., bytes], change: Callable[[bytes], bytes], reason: str
) -> None:
    data = make_jpeg()
    assert change(data) != data
    with pytest.raises(NotPlain, match=reason):
        parse_header(change(data))
