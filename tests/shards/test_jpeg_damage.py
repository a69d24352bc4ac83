"""What a strict decode finds, and what it leaves alone."""

import io
from collections.abc import Callable
from importlib.resources import files
from types import ModuleType

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from maestri.shards.images import KEPT, BadImage, is_whole_jpeg, store
from maestri.shards.jpeg import read_header
from maestri.shards.jpeg_damage import find_damage

Encode = Callable[..., bytes]
KINDS: dict[str, dict] = {
    "baseline": {},
    "restart": {"restart_marker_blocks": 4},
    "progressive": {"progressive": True},
    "progressive restart": {"progressive": True, "restart_marker_rows": 1},
}


@pytest.fixture(scope="module")
def mutations(load_module: Callable[[str], ModuleType]) -> ModuleType:
    return load_module("jpeg_mutations")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A part of a photograph."""
    with Image.open(io.BytesIO(files("sklearn.datasets.images").joinpath("china.jpg").read_bytes())) as image:
        return image.crop((100, 100, 420, 340))


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def coded(request: pytest.FixtureRequest, photo: Image.Image, encode: Encode) -> bytes:
    return encode(photo, quality=90, **request.param)


def damage(data: bytes) -> str:
    return find_damage(data, read_header(data))


def blocks_at(data: bytes) -> int:
    header = read_header(data)
    assert header is not None
    return header.scan_at + 14


def planted(data: bytes, how: str, dice: np.random.Generator) -> bytes:
    """Returns the JPEG with damage of a kind somewhere in its blocks."""
    at = int(dice.integers(blocks_at(data), len(data) - 5000))
    if how == "flipped bit":
        return data[:at] + bytes([data[at] ^ 1 << int(dice.integers(8))]) + data[at + 1 :]
    if how == "zeros":
        return data[:at] + bytes(512) + data[at + 512 :]
    if how == "noise":
        return data[:at] + dice.bytes(512) + data[at + 512 :]
    if how == "missing bytes":
        return data[:at] + data[at + 4096 :]
    return data[:at] + b"\xff\xd9"


def test_find_damage__nothing_in_whole_jpegs(coded: bytes) -> None:
    assert damage(coded) == ""


@pytest.mark.parametrize("how", ["flipped bit", "zeros", "noise", "missing bytes", "cut short"])
def test_find_damage__finds_what_a_full_decode_finds(coded: bytes, how: str) -> None:
    dice = np.random.default_rng(0)
    for _ in range(20):
        data = planted(coded, how, dice)
        try:
            simplejpeg.decode_jpeg(data)
        except ValueError:
            assert damage(data), how


@pytest.mark.parametrize("how", ["noise", "missing bytes", "cut short"])
def test_find_damage__finds_all_gross_damage(coded: bytes, how: str) -> None:
    dice = np.random.default_rng(1)
    for _ in range(20):
        data = planted(coded, how, dice)
        assert damage(data), how
        with pytest.raises(BadImage):
            store(data)


def test_find_damage__finds_zeros_between_restart_markers(encode: Encode, photo: Image.Image) -> None:
    data = encode(photo, quality=90, restart_marker_blocks=4)
    dice = np.random.default_rng(2)
    assert all(damage(planted(data, "zeros", dice)) for _ in range(30))


def test_find_damage__pillow_and_a_tolerant_decoder_see_nothing(encode: Encode, photo: Image.Image) -> None:
    """The reason why Pillow does not do."""
    data = planted(encode(photo, quality=90), "missing bytes", np.random.default_rng(3))
    Image.open(io.BytesIO(data)).load()
    assert "premature end of data segment" in damage(data)


def test_find_damage__misses_progressive_scans_that_are_not_there(encode: Encode, photo: Image.Image) -> None:
    for image in (photo, photo.convert("L")):
        data = encode(image, progressive=True)
        scans = [at for at in range(len(data)) if data[at : at + 2] in (b"\xff\xda", b"\xff\xc4")]
        scans = [at for at in scans if at > blocks_at(data)]
        assert len(scans) > 5
        for at in scans:
            assert damage(data[:at] + b"\xff\xd9") == "scans are missing"
        assert damage(data) == ""


@pytest.mark.parametrize(
    "padding", [b"\0", b"\x11" * 10, bytes(200), b"\xff" * 50, b"\x01\x02\x03\x04\x05\x06\x07\x08"]
)
def test_find_damage__takes_padding_before_the_end_marker(coded: bytes, padding: bytes) -> None:
    data = coded[:-2] + padding + coded[-2:]
    assert damage(data) == ""
    assert store(data).data == data
    assert store(data + b"\xff\xda\xff\xd9 another picture").stored == KEPT


def test_find_damage__takes_no_padding_for_blocks(encode: Encode, photo: Image.Image) -> None:
    data = encode(photo, quality=90)
    assert damage(data[:-3000] + bytes(3000) + b"\xff\xd9")
    assert damage(data[:-3000] + b"\xff" * 3000 + b"\xff\xd9")
    assert damage(data[:-2] + np.random.default_rng(0).bytes(60).replace(b"\xff", b"\0") + b"\xff\xd9")


def _adobe(transform: int) -> bytes:
    return b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b"JFIF\0\x01", b"JFIF\0\x02", 1),
        lambda data: data[:2] + _adobe(5) + data[20:],
        lambda data: data[:2] + b"\xff\xe2\0\x14ICC_PROFILE\0\x07\x03....." [:22] + data[2:],
        lambda data: data[:2] + b"\xff\xe1\0\x0cExif\0\0junk" + data[2:],
        lambda data: data[:2] + b"\xff\xed\0\x04\0\0" + data[2:],
        lambda data: data + b"\0" * 333,
    ],
    ids=["JFIF 2", "Adobe transform", "ICC", "EXIF", "Photoshop", "bytes behind the end"],
)  # fmt: skip
def test_find_damage__takes_harmless_oddities(coded: bytes, change: Callable[[bytes], bytes]) -> None:
    odd = change(coded)
    assert odd != coded
    assert damage(odd) == ""
    assert store(odd).data == odd
    assert store(odd, resize_shorter=50).height == 50
    broken = odd[: len(odd) // 2] + b"\xff\xd9"
    assert damage(broken), "and still looks at the pixels"


def test_find_damage__takes_meaningless_scan_parameters(encode: Encode, photo: Image.Image) -> None:
    data = encode(photo)
    at = blocks_at(data)
    odd = data[: at - 3] + b"\0\0\0" + data[at:]
    assert damage(odd) == ""
    assert damage(odd[: len(odd) // 2] + b"\xff\xd9")


def test_store__damaged_jpegs_end_in_bad_image_or_decode(mutations: ModuleType) -> None:
    assert list(mutations.problems(600)) == []


def test_mutants__are_many_and_the_same_each_time(mutations: ModuleType) -> None:
    first, second = (list(mutations.mutants(300, seed=5)) for _ in range(2))
    assert first == second
    plain = sum(read_header(data) is not None for _, data in first)
    assert 150 < plain < 290, "half are whole up to their pixels"
    outcomes = [_is_stored(data) for _, data in first]
    assert 60 < sum(outcomes) < 240


def _is_stored(data: bytes) -> bool:
    try:
        store(data)
    except BadImage:
        return False
    return True


def test_is_whole_jpeg__store_then_makes_the_same_without_decoding(mutations: ModuleType) -> None:
    found = {True: 0, False: 0}
    for _, data in mutations.mutants(600, seed=1):
        whole = is_whole_jpeg(data)
        found[whole] += 1
        if whole:
            assert store(data, check="header") == store(data, check="decode")
    assert min(found.values()) > 20, "neither all nor none"


def test_is_whole_jpeg__other_images_are_none(encode: Encode, photo: Image.Image) -> None:
    assert is_whole_jpeg(encode(photo))
    for kind in ("PNG", "WEBP"):
        assert not is_whole_jpeg(encode(photo, kind))
    assert not is_whole_jpeg(encode(photo.convert("CMYK")))
    assert not is_whole_jpeg(encode(photo)[:-2]), "its end marker is missing"
    assert not is_whole_jpeg(b"")
