"""Odd files as ImageNet has them, and the ways of storing that one has to ask for."""

import base64
import io
import struct
from collections.abc import Callable
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image

from maestri.shards.images import FIXED, KEPT, LOSSLESS, MENDED, RESIZED, TRANSCODED, BadImage, store

Encode = Callable[..., bytes]

# Made by libjpeg-turbo's ``jpegtran -arithmetic``: 32 × 24 pixels; red is 4 x + 5 y, green its inverse, blue 128.
ARITHMETIC_GREY = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQYEpR"
    "Uk//yQALCAAYACABAREA/8wABgAQEAX/2gAIAQEAAD8A0Z0ZLDSYmkQD+I1BC8MqzPLfgP/Z"
)
ARITHMETIC_RGB = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQYEpR"
    "Uk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//yQARCAAYACADASIA"
    "AhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwDRnRksNH6FanXXDu884r/YjInJHjOabDWVzKhRYnqrmcz1qMGq4iInxAP/2Q=="
)
TWELVE_BITS = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8XGBYUGBIU"
    "FRT/wQALDAAQABABAREA/8QAFQABAQAAAAAAAAAAAAAAAAAADAD/xAAbEAABBAMAAAAAAAAAAAAAAAAKACc3RFNhcf/aAAgBAQAAPwAPoDgDhH7f4KnN"
    "JCsDgDhH7f4KnNKBwBwj9v8ABU5pIVQcAcI/b/BU5pf/2Q=="
)


def decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def levels(data: bytes) -> np.ndarray:
    return np.asarray(decoded(data), np.int64)


@pytest.fixture(scope="module")
def china() -> bytes:
    """A photograph, as it came."""
    return files("sklearn.datasets.images").joinpath("china.jpg").read_bytes()


@pytest.fixture(scope="module")
def photo(china: bytes) -> Image.Image:
    return decoded(china)


def test_store__photographs_stay_as_they_are(china: bytes) -> None:
    flower = files("sklearn.datasets.images").joinpath("flower.jpg").read_bytes()
    for source in (china, flower):
        assert store(source).data == source
        assert store(source, check="header") == store(source)


def test_store__arithmetic_coding() -> None:
    ramp = np.add.outer(np.arange(24) * 5, np.arange(32) * 4)
    grey, rgb = store(ARITHMETIC_GREY), store(ARITHMETIC_RGB)
    assert (grey.stored, rgb.stored) == (TRANSCODED, TRANSCODED)
    colours = np.stack([ramp, 255 - ramp, np.full_like(ramp, 128)], -1)
    assert abs(levels(rgb.data) - colours).mean() < 4
    assert abs(levels(grey.data) - colours @ (0.299, 0.587, 0.114)).mean() < 4


def test_store__twelve_bits_are_named() -> None:
    with pytest.raises(BadImage, match="JPEG that nothing here decodes: 1 components of 12 bits"):
        store(TWELVE_BITS)
    with pytest.raises(BadImage, match="of 12 bits"):
        store(TWELVE_BITS, mend=True)


def test_store__cmyk_and_ycck_with_adobes_inverted_inks(encode: Encode) -> None:
    red = Image.new("RGB", (16, 16), (200, 30, 40))
    cmyk = encode(red.convert("CMYK"), "JPEG", quality=100)
    assert b"Adobe" in cmyk
    assert abs(levels(store(cmyk).data)[8, 8] - (200, 30, 40)).max() <= 3
    # Adobe's transform 2 says YCCK: the same file then means the colours that libjpeg converts the first three into.
    at = cmyk.index(b"Adobe") + 11
    ycck = cmyk[:at] + b"\2" + cmyk[at + 1 :]
    expected = np.asarray(decoded(ycck).convert("RGB"), np.int64)
    assert abs(levels(store(ycck).data) - expected).max() <= 4
    assert abs(expected - levels(store(cmyk).data)).max() > 50
    with pytest.raises(BadImage, match="premature end"):
        store(encode(decoded(cmyk).resize((300, 300)), "JPEG")[:1000] + b"\xff\xd9")


def test_store__a_png_named_jpeg_is_a_png(photo: Image.Image, encode: Encode) -> None:
    image = store(encode(photo, "PNG"))
    assert (image.stored, image.data[:2]) == (TRANSCODED, b"\xff\xd8")
    assert abs(levels(image.data) - np.asarray(photo, np.int64)).max() <= 4


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_store__strips_of_one_pixel(encode: Encode, photo: Image.Image, size: tuple[int, int], options: dict) -> None:
    source = encode(photo.resize(size), **options)
    image = store(source, resize_shorter=64)
    assert (image.data, image.width, image.height) == (source, *size)


def test_store__header_between_junk_is_written_anew(china: bytes, photo: Image.Image) -> None:
    junk = china[:2] + b"junk" + china[2:]
    image = store(china[:20] + b"junk" + china[20:])
    assert image.stored == TRANSCODED
    assert abs(levels(image.data) - np.asarray(photo, np.int64)).max() <= 4
    with pytest.raises(BadImage, match="no known image format|JPEG"):
        store(junk)


def test_store__pixels_may_be_rgb(photo: Image.Image) -> None:
    image = store(np.asarray(photo))
    assert (image.width, image.height, image.stored) == (640, 427, TRANSCODED)
    assert abs(levels(image.data) - np.asarray(photo, np.int64)).max() <= 4


@pytest.mark.parametrize("pixels", [np.zeros((0, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros(9, np.uint8)])
def test_store__refuses_arrays_of_other_shapes(pixels: np.ndarray) -> None:
    with pytest.raises(BadImage, match="is no image"):
        store(pixels)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
def test_store__mends_what_was_cut_short(photo: Image.Image, encode: Encode, progressive: bool, end: bytes) -> None:
    exif = Image.Exif()
    exif[274] = 6
    whole = encode(photo, progressive=progressive, exif=exif)
    cut = whole[: len(whole) * 2 // 3] + end
    with pytest.raises(BadImage):
        store(cut)
    image = store(cut, mend=True)
    assert (image.stored, image.width, image.height, image.orientation) == (FIXED, 640, 427, 6)
    assert abs(levels(image.data)[:200] - levels(whole)[:200]).mean() < 12
    assert store(image.data).stored == KEPT
    assert store(cut, mend=True, resize_shorter=100).height == 100


def test_store__mends_damaged_blocks_and_other_formats(photo: Image.Image, encode: Encode) -> None:
    jpeg = bytearray(encode(photo, quality=90))
    jpeg[len(jpeg) // 2 : len(jpeg) // 2 + 2] = b"\xff\x12"  # fatal to libjpeg
    for source in (bytes(jpeg), encode(photo, "PNG")[:200_000], encode(photo, "BMP")[:-50_000]):
        with pytest.raises(BadImage):
            store(source)
        image = store(source, mend=True)
        assert image.stored == FIXED
        of_rows = abs(levels(image.data) - np.asarray(photo, np.int64)).mean((1, 2))
        assert (of_rows < 8).sum() > 200


def test_store__mends_nothing_out_of_nothing(china: bytes, encode: Encode, photo: Image.Image) -> None:
    for source in (b"", b"garbage" * 99, china[:700], china[:-100_000][:630] + b"\xff\xd9", encode(photo, "PNG")[:60]):
        with pytest.raises(BadImage):
            store(source, mend=True)
    assert store(china, mend=True).stored == KEPT
    assert store(china[:-2], mend=True).stored == MENDED


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_store__lossless_keeps_pngs(photo: Image.Image, encode: Encode, mode: str) -> None:
    source = encode(photo.convert(mode), "PNG")
    for check in ("decode", "header"):
        image = store(source, lossless=True, check=check)
        assert (image.data, image.stored, image.extension) == (source, LOSSLESS, "png")
    damaged = source[:5000] + source[9000:]
    with pytest.raises(BadImage):
        store(damaged, lossless=True)


def test_store__lossless_makes_pngs(photo: Image.Image, encode: Encode) -> None:
    pixels = np.asarray(photo)
    sources = (encode(photo, "BMP"), encode(photo, "WEBP", lossless=True), pixels, encode(photo, "PNG") + b"behind")
    for source in sources:
        image = store(source, lossless=True)
        assert (image.stored, image.extension, image.width) == (LOSSLESS, "png", 640)
        assert np.array_equal(levels(image.data), pixels)
    palette = photo.convert("P")
    for source in (encode(palette, "PNG"), encode(photo.convert("RGBA"), "PNG"), encode(palette, "GIF")):
        image = store(source, lossless=True)
        assert (image.data != source, image.extension) == (True, "png")
        assert np.array_equal(levels(image.data), np.asarray(decoded(source).convert("RGB")))
    assert decoded(store(encode(photo.convert("LA"), "PNG"), lossless=True).data).mode == "L"


def test_store__lossless_leaves_jpegs_alone(china: bytes) -> None:
    image = store(china, lossless=True)
    assert (image.data, image.stored, image.extension) == (china, KEPT, "jpg")


@pytest.mark.parametrize(
    ("shorter", "size"), [(256, (384, 256)), (96, (144, 96)), (50, (75, 50)), (16, (24, 16)), (426, (639, 426))]
)
def test_store__resizes_photographs(china: bytes, photo: Image.Image, shorter: int, size: tuple[int, int]) -> None:
    image = store(china, resize_shorter=shorter, quality=98)
    assert (image.width, image.height, image.stored) == (*size, RESIZED)
    result = decoded(image.data)
    assert (result.size, result.layer[0][1:3]) == (size, (1, 1))
    exact = np.asarray(photo.resize(size, Image.Resampling.LANCZOS), np.int64)
    error = np.mean((levels(image.data) - exact) ** 2)
    assert error < 12, "37 dB from full decoding and Lanczos"


def test_store__resizes_with_the_quality_that_was_asked_for(china: bytes) -> None:
    small = store(china, resize_shorter=200, quality=80)
    assert [part[1:3] for part in decoded(small.data).layer] == [(2, 2), (1, 1), (1, 1)], "4:2:0"
    assert len(small.data) < len(store(china, resize_shorter=200, quality=95).data)


def test_store__resizes_only_downwards(china: bytes) -> None:
    for shorter in (0, 427, 428, 5000):
        assert store(china, resize_shorter=shorter).data == china


def test_store__resizes_every_kind_and_keeps_orientation(photo: Image.Image, encode: Encode) -> None:
    exif = Image.Exif()
    exif[274] = 8
    tall = photo.crop((0, 0, 200, 400))
    for source in (encode(tall, exif=exif), encode(tall, "PNG", exif=exif), encode(tall, "WEBP", exif=exif)):
        image = store(source, resize_shorter=50)
        assert (image.width, image.height, image.orientation, image.stored) == (50, 100, 8, RESIZED)
    assert decoded(store(encode(tall.convert("L")), resize_shorter=50).data).mode == "L"
    png = store(encode(tall, "PNG"), resize_shorter=50, lossless=True)
    assert (png.extension, png.stored) == ("png", RESIZED)
    assert store(np.asarray(tall), resize_shorter=50).stored == RESIZED


def test_store__resized_images_are_checked_first(china: bytes) -> None:
    with pytest.raises(BadImage, match="premature"):
        store(china[:90_000] + b"\xff\xd9", resize_shorter=100)


def test_store__tiffs_are_upright(photo: Image.Image, encode: Encode) -> None:
    exif = Image.Exif()
    exif[274] = 6
    image = store(encode(photo, "TIFF", exif=exif))
    assert (image.width, image.height, image.orientation) == (427, 640, 1)


def test_store__pngs_are_checked_by_their_checksums(photo: Image.Image, encode: Encode) -> None:
    source = bytearray(encode(photo, "PNG"))
    source[100_000] ^= 1
    with pytest.raises(BadImage, match="wrong checksum"):
        store(bytes(source))
    text = encode(photo, "PNG").replace(b"IDAT", b"tEXt", 1)
    with pytest.raises(BadImage):
        store(text)
    whole = encode(photo, "PNG")
    assert store(whole[:-12] + b"\0\0\0\4tEXtjunkjunk" + whole[-12:]).stored == TRANSCODED
    assert store(whole[:-12]).stored == TRANSCODED, "all pixels are there"


def test_store__broken_exif_of_every_kind(china: bytes) -> None:
    blocks = (b"", b"II", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + b"\1\x12" * 9, b"II*\0\x08\0\0\0\1\0")
    for block in blocks:
        segment = b"Exif\0\0" + block
        source = china[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + china[2:]
        assert store(source).orientation == 1
        assert store(source).data == source
