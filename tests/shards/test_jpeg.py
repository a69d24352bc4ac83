from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maestri.shards.jpeg import read_header


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
