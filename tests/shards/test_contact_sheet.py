"""``sample``: a sheet with images where they should be."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from maestri.shards.contact_sheet import GAP, TEXT, TILE, ellipsised, in_ascii, rows_for, sheet
from maestri.shards.convert import ConvertConfig, convert
from maestri.shards.errors import ShardError
from maestri.shards.shard_set import ShardSet

MakeFolder = Callable[[Path, dict[str, bytes]], Path]
Encode = Callable[..., bytes]
LONG = "a class of a very long name indeed"
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), LONG: (9, 9, 9)}


@pytest.fixture
def colours(make_folder: MakeFolder, encode: Encode, tmp_path: Path) -> ShardSet:
    files = {f"{name}/1.png": encode(Image.new("RGB", (300, 200), colour), "PNG") for name, colour in COLOURS.items()}
    exif = Image.Exif()
    exif[274] = 6
    turned = Image.new("RGB", (80, 40), (255, 0, 0))
    turned.paste((255, 255, 255), (40, 0, 80, 40))
    files["red/turned.png"] = encode(turned, "PNG", exif=exif)
    convert(make_folder(tmp_path / "source", files), tmp_path / "set", ConvertConfig(workers=1))
    return ShardSet.open(tmp_path / "set")


def near(pixel: object, colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(np.array(pixel, int) - colour).max() < 12)


def test_sheet__images_stand_in_the_order_of_rows(colours: ShardSet) -> None:
    rows = rows_for(colours, count=10, seed=0)
    assert rows.tolist() == [0, 1, 2, 3, 4]
    picture = sheet(colours, rows)
    assert picture.size == (GAP + 3 * (TILE + GAP), GAP + 2 * (TILE + TEXT + GAP))
    for row in rows.tolist():
        if colours.key(row) == "red/turned":
            continue
        left, top = GAP + row % 3 * (TILE + GAP), GAP + row // 3 * (TILE + TEXT + GAP)
        name = colours.manifest.class_names[int(colours.columns.label[row])]
        assert near(picture.getpixel((left + TILE // 2, top + TILE // 2)), COLOURS[name])
        text = np.asarray(picture.crop((left, top + TILE + 2, left + TILE, top + TILE + TEXT)).convert("L"))
        assert text.min() < 100, "there should be a caption"
    colours.close()


def test_sheet__images_stand_upright(colours: ShardSet) -> None:
    row = next(row for row in range(5) if colours.key(row) == "red/turned")
    picture = sheet(colours, np.array([row]))
    middle = GAP + TILE // 2
    assert near(picture.getpixel((middle, middle - 20)), (255, 0, 0))
    assert near(picture.getpixel((middle, middle + 20)), (255, 255, 255))
    colours.close()


def test_rows_for__one_class_and_a_seed(whole: Path) -> None:
    with ShardSet.open(whole) as shard_set:
        rows = rows_for(shard_set, count=12, seed=0, class_name="class 1")
        assert len(rows) == 12
        assert set(shard_set.label(rows).tolist()) == {1}
        assert rows_for(shard_set, count=12, seed=1).tolist() != rows_for(shard_set, count=12, seed=2).tolist()
        with pytest.raises(ShardError, match="there is no class 'clas 1'; there are 3: class 0, class 1, class 2"):
            rows_for(shard_set, count=1, seed=0, class_name="clas 1")


def test_ellipsised__keeps_start_and_end() -> None:
    font = ImageFont.load_default(12)
    assert ellipsised("short", 200, font) == "short"
    text = ellipsised(LONG, 100, font)
    assert font.getlength(text) <= 100
    assert text.startswith("a cl")
    assert text.endswith("eed")
    assert "..." in text


def test_in_ascii__for_a_font_without_other_letters() -> None:
    assert in_ascii("Zürich 日本 ½") == "Zurich ?? 1?2"


def test_sheet__small_images_keep_their_pixels(make_folder: MakeFolder, encode: Encode, tmp_path: Path) -> None:
    checks = Image.fromarray(np.indices((8, 8)).sum(0).astype(np.uint8) % 2 * 255)
    convert(
        make_folder(tmp_path / "source", {"1.png": encode(checks, "PNG")}), tmp_path / "set", ConvertConfig(workers=1)
    )
    with ShardSet.open(tmp_path / "set") as shard_set:
        stored = np.asarray(Image.open(io.BytesIO(shard_set.read(np.array([0]))[0])))
        picture = np.asarray(sheet(shard_set, np.array([0])).convert("L"))
    step = TILE // 8
    assert np.array_equal(picture[GAP + step // 2 : GAP + TILE : step, GAP + step // 2 : GAP + TILE : step], stored)
