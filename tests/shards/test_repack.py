"""``repack``: other shards, the same stored images."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maestri.shards.convert import ConvertConfig, convert, convert_source
from maestri.shards.shard_set import ShardSet
from maestri.shards.sources.shard_set import ShardSetSource
from maestri.shards.verify import damage

ReadAll = Callable[[Path], dict[str, bytes]]
NAMES = ("bytes", "width", "height", "orientation", "stored", "label", "crc32")


@pytest.fixture(scope="module")
def mixed(images: Path, encode: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set with images that were encoded anew, one of them turned."""
    source = Path(shutil.copytree(images, tmp_path_factory.mktemp("repack") / "source"))
    exif = Image.Exif()
    exif[274] = 6
    picture = Image.linear_gradient("L").resize((40, 30))
    (source / "class 1" / "turned.png").write_bytes(encode(picture, "PNG", exif=exif))
    (source / "class 2" / "plain.png").write_bytes(encode(picture, "PNG"))
    out = source.parent / "set"
    convert(source, out, ConvertConfig(workers=1, shard_bytes=8000))
    return out


def repacked(source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return convert_source(
        ShardSetSource(source), out, ConvertConfig(**{"workers": 1, "seed": -1, "check": "header", **settings})
    )


def contents(folder: Path) -> dict[str, Any]:
    with ShardSet.open(folder) as shard_set:
        rows = np.arange(len(shard_set))
        found: dict[str, Any] = {name: np.array(getattr(shard_set.columns, name)).tolist() for name in NAMES}
        found["keys"] = [shard_set.key(row) for row in rows]
        found["images"] = shard_set.read_checked(rows)
        found["labels"] = [shard_set.labels_of(row) for row in rows]
        found["class_names"] = shard_set.manifest.class_names
        return found


@pytest.mark.parametrize("form", ["tar", "beton", "both"])
def test_repack__keeps_rows_with_everything_that_is_known_of_them(mixed: Path, tmp_path: Path, form: str) -> None:
    repacked(mixed, tmp_path / "set", format=form, shard_bytes=20_000)
    before = contents(mixed)
    assert {0, 1} == set(before["stored"])
    assert {1, 6} == set(before["orientation"])
    folders = [tmp_path / "set" / one for one in ("tar", "beton")] if form == "both" else [tmp_path / "set"]
    for folder in folders:
        assert contents(folder) == before
        assert list(damage(folder)) == []


def test_repack__there_and_back(mixed: Path, tmp_path: Path, read_all: ReadAll) -> None:
    repacked(mixed, tmp_path / "beton", format="beton", shard_samples=17)
    with ShardSet.open(mixed) as shard_set:
        size = shard_set.manifest.shards[0].num_samples
    repacked(tmp_path / "beton", tmp_path / "tar", shard_samples=size)
    assert (tmp_path / "tar" / "shard-00000.tar").read_bytes() == (mixed / "shard-00000.tar").read_bytes()
    assert contents(tmp_path / "tar") == contents(mixed)


def test_repack__with_a_seed_shuffles(mixed: Path, tmp_path: Path) -> None:
    repacked(mixed, tmp_path / "set", seed=3)
    before, after = contents(mixed), contents(tmp_path / "set")
    assert after["keys"] != before["keys"]
    assert sorted(zip(after["keys"], after["images"], strict=True)) == sorted(
        zip(before["keys"], before["images"], strict=True)
    )


def test_repack__saves_what_is_left_of_a_damaged_set(mixed: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(mixed, tmp_path / "damaged"))
    with ShardSet.open(damaged) as shard_set:
        path, offset = shard_set.path_of(0), int(shard_set.columns.offset[3])
        key = shard_set.key(3)
    data = bytearray(path.read_bytes())
    data[offset + 7] ^= 1
    data[offset - 300] ^= 1  # the tar's header, too: no tar reader can read this shard any more
    path.write_bytes(data)
    (manifest,) = repacked(damaged, tmp_path / "set").values()
    assert manifest.num_quarantined == 1
    before = contents(mixed)
    assert contents(tmp_path / "set")["images"] == before["images"][:3] + before["images"][4:]
    (line,) = (tmp_path / "set" / "quarantine.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["key"] == key
    assert entry["reason"] == f"shard-00000.tar, byte {offset}: CRC-32 of {key} is wrong"


def test_repack__keys_that_occur_twice(make_jpeg: Callable[..., bytes], tmp_path: Path) -> None:
    """In tars of others: sample 0 of each shard may be called the same."""
    import webdataset

    from maestri.shards.adopt import AdoptConfig, adopt

    (tmp_path / "wds").mkdir()
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / "wds" / f"{number}.tar"), encoder=False) as sink:
            sink.write({"__key__": "0", "jpg": make_jpeg(seed=number), "cls": b"0"})
    adopt(tmp_path / "wds", None, AdoptConfig(workers=1))
    repacked(tmp_path / "wds", tmp_path / "set")
    assert contents(tmp_path / "set")["keys"] == ["0", "0-1"]
    assert contents(tmp_path / "set")["images"] == contents(tmp_path / "wds")["images"]


def test_repack__several_labels(make_jpeg: Callable[..., bytes], tmp_path: Path) -> None:
    import webdataset

    from maestri.shards.adopt import AdoptConfig, adopt

    (tmp_path / "wds").mkdir()
    with webdataset.TarWriter(str(tmp_path / "wds" / "x.tar"), encoder=False) as sink:
        for number, labels in enumerate((b"[2, 0]", b"[]", b"[1]")):
            sink.write({"__key__": str(number), "jpg": make_jpeg(seed=number), "json": b'{"labels": ' + labels + b"}"})
    adopt(tmp_path / "wds", None, AdoptConfig(workers=1))
    for form in ("tar", "beton"):
        repacked(tmp_path / "wds", tmp_path / form, format=form)
        found = contents(tmp_path / form)
        assert [set(labels) for labels in found["labels"]] == [{0, 2}, set(), {1}]
        assert list(damage(tmp_path / form)) == []


def test_repack__png_keeps_what_is_known_of_it(
    encode: Callable[..., bytes], make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """A 16-bit PNG was stored as one of 8 bits, which has lost the orientation."""
    exif = Image.Exif()
    exif[274] = 6
    deep = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    source = make_folder(tmp_path / "source", {"deep.png": encode(deep, "PNG", exif=exif)})
    convert(source, tmp_path / "png", ConvertConfig(workers=1, lossless=True))
    repacked(tmp_path / "png", tmp_path / "set", lossless=True)
    assert contents(tmp_path / "set") == contents(tmp_path / "png")
    assert contents(tmp_path / "png")["orientation"] == [6]
