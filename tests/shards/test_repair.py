"""``verify --repair``: everything but the shards made anew, and never a damaged image called whole."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from maestri.shards import repair as repairs
from maestri.shards.adopt import AdoptConfig, adopt
from maestri.shards.beton_shard import FIXED_BYTES
from maestri.shards.convert import ConvertConfig, convert
from maestri.shards.errors import ShardError
from maestri.shards.gather import locked
from maestri.shards.manifest import Manifest
from maestri.shards.repair import repair
from maestri.shards.shard_set import ShardSet
from maestri.shards.verify import damage

MakeFolder = Callable[[Path, dict[str, bytes]], Path]
ReadAll = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="module", params=["tar", "beton"])
def whole_set(
    request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory, encode: Callable[..., bytes]
) -> Path:
    """A set in which one image was encoded anew, and one has an orientation."""
    from PIL import Image

    source = tmp_path_factory.mktemp("repair") / "source"
    shutil.copytree(images, source)
    picture = Image.linear_gradient("L").resize((40, 30))
    exif = Image.Exif()
    exif[274] = 6
    (source / "class 1" / "turned.png").write_bytes(encode(picture, "PNG", exif=exif))
    (source / "class 2" / "bad.jpg").write_bytes(b"bad")
    out = tmp_path_factory.mktemp("sets") / "set"
    convert(source, out, ConvertConfig(workers=1, shard_bytes=8000, format=request.param))
    return out


@pytest.fixture
def folder(whole_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_set, tmp_path / "set"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def flip_image(folder: Path, row: int) -> tuple[Path, str]:
    with ShardSet.open(folder) as shard_set:
        path, key = shard_set.path_of(int(shard_set.columns.shard[row])), shard_set.key(row)
        flip(path, int(shard_set.columns.offset[row]) + 400)
    return path, key


@pytest.mark.parametrize("lost", ["index.bin", "manifest.json"])
def test_repair__of_a_beton_or_tar_set_brings_back_what_is_in_the_shards(
    whole_set: Path, folder: Path, lost: str
) -> None:
    (folder / lost).unlink()
    done = repair(folder)
    assert list(damage(folder)) == []
    with ShardSet.open(folder) as again, ShardSet.open(whole_set) as before:
        rows = np.arange(len(before))
        assert again.read_checked(rows) == before.read(rows)
        assert [again.key(row) for row in rows] == [before.key(row) for row in rows]
        assert np.array_equal(again.label(rows), before.label(rows))
        is_tar = before.manifest.format == "tar"
        names = before.manifest.class_names if lost == "index.bin" or not is_tar else ("0", "1", "2")
        assert again.manifest.class_names == names
        assert again.manifest.num_quarantined == 1
        if lost == "manifest.json" or not is_tar:
            assert np.array_equal(again.columns.stored, before.columns.stored)
            assert np.array_equal(again.columns.orientation, before.columns.orientation)
    assert done.is_identical == (lost == "index.bin" and not is_tar)
    if is_tar:
        assert done.notes


def test_repair__a_flipped_byte_in_the_index_is_undone(whole_set: Path, folder: Path, read_all: ReadAll) -> None:
    with ShardSet.open(folder) as shard_set:
        layout = shard_set.manifest.index["columns"]
    for column in ("offset", "bytes", "width", "crc32", "label", "key_end", "keys", "shard"):
        flip(folder / "index.bin", layout[column]["offset"] + 8)
        assert list(damage(folder)) != []
        done = repair(folder)
        same = {name: data for name, data in read_all(folder).items() if name != "manifest.json"}
        assert same["index.bin"] == (whole_set / "index.bin").read_bytes(), column
        assert done.is_identical
        assert done.notes == ()
    assert read_all(folder) == read_all(whole_set)


def test_repair__a_lost_dali_index(whole_set: Path, folder: Path, read_all: ReadAll) -> None:
    for path in folder.glob("*.idx"):
        path.unlink()
    assert repair(folder, workers=2).is_identical
    assert read_all(folder) == read_all(whole_set)


@pytest.mark.parametrize("lost", ["", "index.bin", "manifest.json"])
def test_repair__never_blesses_damaged_images(folder: Path, read_all: ReadAll, lost: str) -> None:
    path, key = flip_image(folder, 7)
    if lost:
        (folder / lost).unlink()
    before = read_all(folder)
    with pytest.raises(ShardError, match="damaged"):
        repair(folder)
    assert read_all(folder) == before
    done = repair(folder, drop_damaged=True)
    assert done.manifest.num_samples < 61
    assert any("left out" in note for note in done.notes)
    assert list(damage(folder)) == []
    listed = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert len(listed) == done.manifest.num_quarantined > 1
    assert any(entry["key"] == key or (path.suffix == ".tar" and lost == "index.bin") for entry in listed)


def test_repair__with_everything_lost_a_decoder_judges(folder: Path) -> None:
    with ShardSet.open(folder) as shard_set:
        row = next(row for row in range(61) if not shard_set.key(row).endswith("turned"))
        path, key = shard_set.path_of(int(shard_set.columns.shard[row])), shard_set.key(row)
        offset, size = int(shard_set.columns.offset[row]), int(shard_set.columns.bytes[row])
    with path.open("r+b") as file:
        file.seek(offset + size - 100)
        file.write(bytes(100))
    (folder / "index.bin").unlink()
    (folder / "manifest.json").unlink()
    with pytest.raises(ShardError, match="damaged"):
        repair(folder)
    done = repair(folder, drop_damaged=True)
    assert done.manifest.num_samples == 60
    assert any(key in note for note in done.notes) or path.suffix == ".beton"


def test_repair__a_missing_shard(folder: Path) -> None:
    with ShardSet.open(folder) as shard_set:
        path, number = shard_set.path_of(1), shard_set.manifest.shards[1].num_samples
    path.unlink()
    with pytest.raises(ShardError, match="the shard is missing"):
        repair(folder)
    assert repair(folder, drop_damaged=True).manifest.num_samples == 61 - number
    assert [str(line) for line in damage(folder)] == []


def test_repair__a_shard_that_cannot_be_read_at_all(folder: Path) -> None:
    with ShardSet.open(folder) as shard_set:
        path = shard_set.path_of(1)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ShardError, match="repack"):
        repair(folder)


def test_repair__class_names_from_a_file(folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").unlink()
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    repair(folder, classes=tmp_path / "names.txt")
    with ShardSet.open(folder) as shard_set:
        assert shard_set.manifest.class_names == ("ant", "bee", "cat")


def test_repair__a_flipped_label_is_not_believed(folder: Path) -> None:
    with ShardSet.open(folder) as shard_set:
        path, key = shard_set.path_of(0), shard_set.key(0)
    if path.suffix == ".tar":
        with tarfile.open(path) as archive:
            flip(path, archive.getmember(f"{key}.cls").offset_data)
        with pytest.raises(ShardError, match="its label is"):
            repair(folder)
    else:
        flip(path, FIXED_BYTES + 16)  # row 0 of the metadata table: its label
        with pytest.raises(ShardError, match="metadata table"):
            repair(folder)


def test_repair__nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="neither a manifest nor shards"):
        repair(tmp_path)


def test_repair__a_manifest_of_another_version(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(ShardError, match="another version"):
        repair(folder)


def test_repair__an_unfinished_conversion_stays_one(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / ".convert").mkdir()
    with pytest.raises(ShardError, match="unfinished conversion"):
        repair(folder)


def test_repair__shards_of_others(make_jpeg: Callable[..., bytes], tmp_path: Path, read_all: ReadAll) -> None:
    folder = tmp_path / "wds"
    folder.mkdir()
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"{number}.tar"), encoder=False) as sink:
            for name in ("a", "b"):
                sink.write({"__key__": name, "jpg": make_jpeg(seed=number), "cls": b"7", "txt": name.encode()})
    adopt(folder, tmp_path / "set", AdoptConfig(workers=1, label="txt"))
    before = read_all(tmp_path / "set")
    (tmp_path / "set" / "index.bin").unlink()
    (tmp_path / "set" / "1.idx").unlink()
    assert repair(tmp_path / "set").is_identical
    assert read_all(tmp_path / "set") == before
    with ShardSet.open(tmp_path / "set") as shard_set:
        path, offset, key = shard_set.path_of(1), int(shard_set.columns.offset[3]), shard_set.key(3)
    flip(path, offset + 1)
    with pytest.raises(ShardError, match="damaged"):
        repair(tmp_path / "set")
    assert repair(tmp_path / "set", drop_damaged=True).manifest.num_samples == 3
    assert '"source": "1.tar' in (tmp_path / "set" / "quarantine.jsonl").read_text()
    assert key == "b"
    assert list(damage(tmp_path / "set")) == []
    with pytest.raises(ShardError, match="maestri shards index"):
        repair(folder)


@pytest.mark.parametrize("field", ['"seed": ', '"num_samples": ', '"name": "'])
def test_repair__a_changed_byte_in_the_manifest(whole_set: Path, folder: Path, field: str) -> None:
    """Class names are had back in any case, settings and checksums only where they still make sense."""
    path = folder / "manifest.json"
    flip(path, path.read_bytes().index(field.encode()) + len(field))
    assert list(damage(folder)) != []
    assert repair(folder).notes
    assert list(damage(folder)) == []
    with ShardSet.open(folder) as again, ShardSet.open(whole_set) as before:
        assert again.manifest.class_names == before.manifest.class_names
        assert np.array_equal(again.columns.crc32, before.columns.crc32)


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def facts(folder: Path) -> dict[str, tuple[int, int]]:
    with ShardSet.open(folder) as shard_set:
        stored, turned = shard_set.columns.stored.tolist(), shard_set.columns.orientation.tolist()
        return {shard_set.key(row): (stored[row], turned[row]) for row in range(len(shard_set))}


@pytest.mark.parametrize("at", ["set", "manifest"])
def test_repair__killed_and_run_again_loses_nothing(
    whole_set: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    with ShardSet.open(folder) as shard_set:
        column = shard_set.manifest.index["columns"]["orientation"]
        row = next(row for row in range(61) if not shard_set.key(row).endswith("turned"))
        key = shard_set.key(row)
    data = bytearray((folder / "index.bin").read_bytes())
    data[column["offset"] + row] = 3  # believed, so that no index with the old checksum comes of what is left
    (folder / "index.bin").write_bytes(data)
    with monkeypatch.context() as patch:
        patch.setattr(*((repairs, "write_set") if at == "set" else (Manifest, "write")), interrupt)
        with pytest.raises(KeyboardInterrupt):
            repair(folder)
    repair(folder)
    assert list(damage(folder)) == []
    before, after = facts(whole_set), facts(folder)
    assert {name: fact for name, fact in after.items() if name != key} == {
        name: fact for name, fact in before.items() if name != key
    }


def test_repair__killed_after_damaged_images_were_dropped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_image(folder, 7)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    expected = repair(other, drop_damaged=True).manifest
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            repair(folder, drop_damaged=True)
    with pytest.raises(ShardError, match="damaged"):
        repair(folder)
    done = repair(folder, drop_damaged=True).manifest
    assert (done.num_samples, done.index) == (expected.num_samples, expected.index)
    assert facts(folder) == facts(other)


def test_repair__while_another_process_is_at_it(folder: Path, tmp_path: Path) -> None:
    with locked(folder), pytest.raises(ShardError, match="another process is writing"):
        repair(folder)
    with pytest.raises(ShardError, match="there is no folder"):
        repair(tmp_path / "nowhere")
