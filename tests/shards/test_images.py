import io
import struct
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maestri.shards import images, pixels
from maestri.shards.images import FORMATS, KEPT, MENDED, TRANSCODED, BadImage, store

Encode = Callable[..., bytes]


def decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30, "subsampling": 2}])
def test_store__keeps_plain_jpegs_byte_for_byte(make_jpeg: Encode, mode: str, options: dict) -> None:
    source = make_jpeg(40, 23, mode, **options)
    image = store(source)
    assert image.data == source
    assert (image.width, image.height, image.orientation, image.stored) == (40, 23, 1, KEPT)


def test_store__keeps_bytes_behind_the_end(make_jpeg: Encode) -> None:
    source = make_jpeg() + bytes(100)
    assert store(source).data == source


def test_store__adds_a_missing_end_marker(make_jpeg: Encode) -> None:
    source = make_jpeg()
    image = store(source[:-2])
    assert (image.data, image.stored) == (source, MENDED)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_store__records_orientation_and_leaves_pixels_as_stored(encode: Encode, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    for kind in ("JPEG", "PNG", "WEBP"):
        image = store(encode(Image.new("RGB", (30, 20)), kind, exif=exif))
        assert (image.width, image.height, image.orientation) == (30, 20, orientation)
        assert decoded(image.data).size == (30, 20)


def test_store__takes_broken_exif_for_none(make_jpeg: Encode) -> None:
    source = make_jpeg()
    for block in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1\x12" * 9):
        damaged = source[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + source[2:]
        image = store(damaged)
        assert (image.data, image.orientation) == (damaged, 1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_store__transcodes_other_formats_at_full_quality(encode: Encode, make_jpeg: Encode, kind: str) -> None:
    original = decoded(make_jpeg(40, 30, quality=95))
    source = encode(original, kind, **({"lossless": True} if kind == "WEBP" else {}))
    image = store(source)
    result = decoded(image.data)
    assert (image.stored, result.format, result.mode, result.layers) == (TRANSCODED, "JPEG", "RGB", 3)
    assert [part[1:3] for part in result.layer] == [(1, 1)] * 3, "4:4:4"
    expected = np.asarray(decoded(source).convert("RGB"), np.int64)
    assert abs(np.asarray(result, np.int64) - expected).max() <= 4


def test_store__keeps_grey_grey(encode: Encode) -> None:
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for source in (encode(ramp, "PNG"), encode(ramp.convert("LA"), "PNG"), encode(ramp.convert("1"), "PNG")):
        assert decoded(store(source).data).mode == "L"


def test_store__transcodes_cmyk_and_rgb_coded_jpegs(encode: Encode, make_jpeg: Encode) -> None:
    red = Image.new("RGB", (16, 16), (200, 30, 40))
    for source in (encode(red.convert("CMYK"), "JPEG", quality=100), encode(red, "JPEG", keep_rgb=True, quality=100)):
        image = store(source)
        assert image.stored == TRANSCODED
        assert abs(np.asarray(decoded(image.data), int)[8, 8] - (200, 30, 40)).max() <= 3


def test_store__scales_sixteen_bits(encode: Encode) -> None:
    values = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    expected = np.rint(values / 257.0)
    for source in (encode(Image.fromarray(values), "PNG"), encode(Image.fromarray(values), "TIFF")):
        assert abs(np.asarray(decoded(store(source).data), float) - expected).max() <= 2
    dark = encode(Image.fromarray(values // 1000), "PNG")  # never brighter than its bits say
    assert np.asarray(decoded(store(dark).data)).max() == 0


def test_store__refuses_pixels_without_a_range(encode: Encode) -> None:
    with pytest.raises(BadImage, match="no stated range"):
        store(encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    with pytest.raises(BadImage, match="32-bit pixels from -5"):
        store(encode(Image.fromarray(np.full((4, 4), -5, np.int32)), "TIFF"))


def test_store__lays_alpha_over_white(encode: Encode) -> None:
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    half = Image.new("LA", (16, 16), (0, 128))
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([0, 0, 255] * 256)
    for source, expected in (
        (encode(clear, "PNG"), 255), (encode(clear, "WEBP", lossless=True), 255), (encode(half, "PNG"), 127),
        (encode(palette, "PNG", transparency=0), 255), (encode(palette, "GIF", transparency=0), 255),
    ):  # fmt: skip
        assert abs(np.asarray(decoded(store(source).data), int) - expected).max() <= 2


def test_store__leaves_profile_and_comment_behind(encode: Encode) -> None:
    source = encode(Image.new("RGB", (16, 16)), "PNG", icc_profile=b"profile" * 9)
    assert not {"icc_profile", "exif", "comment"} & set(decoded(store(source).data).info)


def test_store__pixels_become_a_grey_jpeg() -> None:
    pixels = np.add.outer(np.arange(28), np.arange(28)).astype(np.uint8)
    image = store(pixels)
    assert (image.width, image.height, image.stored) == (28, 28, TRANSCODED)
    assert abs(np.asarray(decoded(image.data), int) - pixels).max() <= 1


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "no known image format"),
        (bytes(5000), "no known image format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "no known image format"),
        (b"\x89PNG\r\n\x1a\n" + bytes(30), "no known image format"),
        (b"P5 100000 100000 255\n", "no sane size|decompression bomb"),
    ],
)
def test_store__says_why_not(source: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        store(source)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_store__refuses_truncated_files(encode: Encode, make_jpeg: Encode, kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    source = encode(noise, kind)
    with pytest.raises(BadImage):
        store(source[: len(source) // 2])
    with pytest.raises(BadImage):
        store(source[: len(source) // 2], check="header")


def test_store__header_check_decodes_no_plain_jpeg(make_jpeg: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert store(make_jpeg(), check="header").stored == KEPT


def test_store__opens_no_format_that_runs_programs() -> None:
    assert not {"EPS", "PDF", "WMF"} & set(FORMATS)


@settings(max_examples=300)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]), st.data())
def test_store__survives_damage(encode: Encode, make_jpeg: Encode, kind: str, data: st.DataObject) -> None:
    source = bytearray(encode(decoded(make_jpeg()), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        source[data.draw(st.integers(0, len(source) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = store(bytes(source))
    except BadImage as error:
        assert str(error) and "\n" not in str(error) and "object at" not in str(error)
    else:
        assert decoded(image.data).size == (image.width, image.height)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("quality", [20, 75, 100])
def test_store__tells_a_missing_end_marker_from_missing_blocks(encode: Encode, mode: str, quality: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        noise = Image.fromarray(rng.integers(0, 255, (*rng.integers(9, 90, 2), 3), dtype=np.uint8)).convert(mode)
        source = encode(noise, "JPEG", quality=quality)
        assert store(source[:-2]).stored == MENDED
        assert store(source[:-1]).stored == MENDED
        for missing in (20, 60, len(source) // 4):
            with pytest.raises(BadImage, match="cut short"):
                store(source[:-missing])


def test_store__refuses_progressive_jpegs_without_their_end(make_jpeg: Encode) -> None:
    with pytest.raises(BadImage, match="cut short"):
        store(make_jpeg(progressive=True)[:-2])


def test_store__palette_and_one_bit_images(encode: Encode, make_jpeg: Encode) -> None:
    palette = decoded(make_jpeg(40, 30)).convert("P")
    stored = decoded(store(encode(palette, "PNG")).data)
    assert abs(np.asarray(stored, int) - np.asarray(palette.convert("RGB"), int)).max() <= 12
    halves = Image.new("1", (16, 16), 0)
    halves.paste(1, (8, 0, 16, 16))
    stored = decoded(store(encode(halves, "PNG")).data)
    assert stored.mode == "L"
    assert np.asarray(stored)[:, :8].max() <= 2
    assert np.asarray(stored)[:, 8:].min() >= 253


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_store__takes_an_orientation_out_of_range_for_none(make_jpeg: Encode, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    assert store(make_jpeg(exif=exif)).orientation == 1


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "RGBA", "RGBa", "LA", "La", "PA", "P", "L", "1", "RGB"])
def test_eight_bits__in_bands_is_as_in_one(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 256, (37, 11, 4), np.uint8)
    if mode == "I":
        image = Image.fromarray(values[:, :, 0].astype(np.int32) * 257)
    elif mode.startswith("I;16"):
        raw = values[:, :, 0].astype(">u2" if mode == "I;16B" else "<u2") * 257
        image = Image.frombytes(mode, (11, 37), raw.tobytes())
    elif mode in ("RGBa", "La"):
        image = Image.fromarray(values).convert({"La": "LA"}.get(mode, "RGBA")).convert(mode)
    elif mode == "PA":
        image = Image.fromarray(values[:, :, :3]).convert("P").convert("PA")
    else:
        image = Image.fromarray(values).convert(mode)
    if mode in ("P", "L", "1"):
        image.info["transparency"] = 0
    if mode == "RGB":
        image.info["transparency"] = tuple(values[5, 5, :3].tolist())
    whole = pixels.eight_bits(image)
    monkeypatch.setattr(pixels, "_BAND_PIXELS", 30)
    parts = pixels.eight_bits(image)
    assert (parts.mode, parts.size, parts.info) == (whole.mode, whole.size, {})
    assert parts.tobytes() == whole.tobytes()
    assert whole.getextrema() != (0, 0)


def test_eight_bits__needs_few_bytes_a_pixel() -> None:
    image = Image.fromarray(np.full((3000, 3000), 65535, np.uint16))
    tracemalloc.start()
    assert pixels.eight_bits(image).getextrema() == (255, 255)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * 9_000_000  # bands need 24 MiB whatever the image's size, its copy as bytes 1 or 2 a pixel


def test_store__counts_scans(make_jpeg: Encode) -> None:
    source = make_jpeg(progressive=True)
    last = source.rindex(b"\xff\xda")
    scans = source.count(b"\xff\xda")
    bomb = source[:-2] + source[last:-2] * (600 - scans) + b"\xff\xd9"
    for options in ({}, {"check": "header"}, {"mend": True}):
        with pytest.raises(BadImage, match="^600 scans"):
            store(bomb, **options)
    fine = source[:-2] + source[last:-2] * (500 - scans) + b"\xff\xd9"
    assert store(fine, check="header").data == fine


def test_store__counts_no_scans_where_there_are_none(make_jpeg: Encode) -> None:
    """Behind the end, and within a comment."""
    for options in ({}, {"progressive": True}):
        source = make_jpeg(**options)
        for data in (source + b"\xff\xda" * 1000, source[:2] + b"\xff\xfe\x07\xd2" + b"\xff\xda" * 1000 + source[2:]):
            assert store(data).data == data


@pytest.mark.parametrize(
    ("function", "options"),
    [("_decode_jpeg", {"mend": True}), ("_encoded", {"mend": True}), ("decode_for", {"resize_shorter": 8})],
)
def test_store__too_little_memory_is_no_damage(
    make_jpeg: Encode, monkeypatch: pytest.MonkeyPatch, function: str, options: dict
) -> None:
    """An image that would be quarantined for it would be lost, though nothing is wrong with it."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(pixels if function == "_decode_jpeg" else images, function, fail)
    whole = make_jpeg(200, 200, quality=98)
    with pytest.raises(MemoryError):
        store(whole if "resize_shorter" in options else whole[: len(whole) // 2], **options)
