"""``index``: shards that webdataset, GNU tar and FFCV made, used where they lie."""

import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import wds2idx
import webdataset
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from nvidia.dali import fn, pipeline_def

from maestri.shards.adopt import AdoptConfig, adopt
from maestri.shards.convert import ConvertConfig, convert
from maestri.shards.errors import ShardError
from maestri.shards.shard_set import ShardSet
from maestri.shards.verify import damage

MakeJpeg = Callable[..., bytes]
MakeFolder = Callable[[Path, dict[str, bytes]], Path]
ReadAll = Callable[[Path], dict[str, bytes]]
ONE = AdoptConfig(workers=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_adopt__rows_are_the_images_in_their_order(
    foreign: Path, jpegs: list[bytes], read_all: ReadAll, workers: int
) -> None:
    before = read_all(foreign)
    folder, manifest = adopt(foreign, None, AdoptConfig(workers=workers))
    assert folder == foreign
    with ShardSet.open(foreign) as shard_set:
        rows = np.arange(10)
        assert shard_set.read_checked(rows) == jpegs
        assert shard_set.label(rows).tolist() == [number % 3 for number in range(10)]
        assert [shard_set.key(row) for row in (0, 9)] == ["n9/im000", "n0/im009"]
        assert shard_set.columns.width.tolist() == [20 + number for number in range(10)]
        assert shard_set.manifest == manifest
    assert manifest.class_names == ("0", "1", "2")
    assert (manifest.seed, manifest.base) == (-1, "")
    after = read_all(foreign)
    assert {name: after[name] for name in before} == before
    assert list(damage(foreign)) == []


def test_adopt__the_same_bytes_from_any_number_of_workers(foreign: Path, tmp_path: Path, read_all: ReadAll) -> None:
    for name, workers in (("one", 1), ("two", 2)):
        adopt(foreign, tmp_path / name, AdoptConfig(workers=workers))
    assert read_all(tmp_path / "one") == read_all(tmp_path / "two")


def test_adopt__into_another_folder_by_a_relative_path(
    foreign: Path, jpegs: list[bytes], tmp_path: Path, read_all: ReadAll
) -> None:
    before = read_all(foreign)
    _, manifest = adopt(foreign / "train-{000..001}.tar", tmp_path / "sets" / "some", ONE)
    assert manifest.base == "../../foreign"
    assert read_all(foreign) == before
    assert {"index.bin", "manifest.json", "train-000.idx", "train-001.idx", "quarantine.jsonl"} == set(
        read_all(tmp_path / "sets" / "some")
    )
    moved = tmp_path / "moved"
    moved.mkdir()
    foreign.rename(moved / "foreign")
    (tmp_path / "sets").rename(moved / "sets")
    with ShardSet.open(moved / "sets" / "some") as shard_set:
        assert shard_set.read_checked(np.arange(8)) == jpegs[:8]


def test_adopt__idx_is_what_dali_itself_writes_and_reads(foreign: Path, jpegs: list[bytes], tmp_path: Path) -> None:
    adopt(foreign, None, ONE)
    tars = sorted(foreign.glob("*.tar"))
    for tar in tars:
        with wds2idx.IndexCreator(str(tar), str(tmp_path / "x.idx"), verbose=False) as creator:
            creator.create_index()
        assert tar.with_suffix(".idx").read_text() == (tmp_path / "x.idx").read_text()

    @pipeline_def(batch_size=10, num_threads=1, device_id=None)
    def pipeline() -> object:
        return fn.readers.webdataset(
            paths=[str(tar) for tar in tars], index_paths=[str(tar.with_suffix(".idx")) for tar in tars], ext=["jpg"],
            missing_component_behavior="error",
        )  # fmt: skip

    reader = pipeline()
    reader.build()
    (batch,) = reader.run()
    assert [bytes(np.asarray(batch[at])) for at in range(10)] == jpegs


def test_adopt__images_that_need_work_are_listed_and_no_rows(
    make_jpeg: MakeJpeg, encode: Callable[..., bytes], tmp_path: Path
) -> None:
    from PIL import Image

    good = make_jpeg(80, 60)
    cut, broken = good[:-200], good[:-300] + bytes(298) + good[-2:]
    cmyk = encode(Image.new("CMYK", (8, 8)))
    png = encode(Image.new("RGB", (8, 8)), "PNG")
    (tmp_path / "wds").mkdir()
    with webdataset.TarWriter(str(tmp_path / "wds" / "x.tar"), encoder=False) as sink:
        for name, data in {"good": good, "cut": cut, "broken": broken, "cmyk": cmyk, "empty": b""}.items():
            sink.write({"__key__": name, "jpg": data})
        sink.write({"__key__": "drawn", "png": png})
        sink.write({"__key__": "text", "txt": b"no image at all"})
    _, manifest = adopt(tmp_path / "wds", None, ONE)
    assert (manifest.num_samples, manifest.num_quarantined, manifest.class_names) == (1, 5, ())
    entries = [json.loads(line) for line in (tmp_path / "wds" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {entry["source"]: entry["reason"] for entry in entries}
    assert "without an end marker" in reasons["x.tar:cut.jpg"]
    assert reasons["x.tar:broken.jpg"]
    assert "maestri shards convert" in reasons["x.tar:cmyk.jpg"]
    assert "maestri shards convert" in reasons["x.tar:drawn.png"]
    assert "empty" in reasons["x.tar:empty.jpg"]
    with pytest.raises(ShardError, match=r"x\.tar:cut\.jpg.*--bad quarantine"):
        adopt(tmp_path / "wds", tmp_path / "strict", AdoptConfig(workers=1, bad="fail"))
    assert not (tmp_path / "strict").exists()


def test_adopt__gnu_tar_of_a_folder(make_folder: MakeFolder, jpegs: list[bytes], tmp_path: Path) -> None:
    """``tar c .``: names begin with ``./``, folders are members, one name has a blank, one is long."""
    names = ["a/one", "a/two words", "b/" + "long" * 40, "b/x.y"]
    files = {f"{name}.jpg": data for name, data in zip(names, jpegs, strict=False)}
    source = make_folder(tmp_path / "source", files)
    (tmp_path / "tars").mkdir()
    subprocess.run(["tar", "cf", tmp_path / "tars" / "all.tar", "--sort=name", "-C", source, "."], check=True)
    _, manifest = adopt(tmp_path / "tars", None, ONE)
    with ShardSet.open(tmp_path / "tars") as shard_set:
        found = {shard_set.key(row): shard_set.read_checked(np.array([row]))[0] for row in range(len(shard_set))}
    assert manifest.num_samples == 3  # b/x.y.jpg has the extension y.jpg, for webdataset too
    assert found == {"a/one": jpegs[0], "a/two%20words": jpegs[1], "b/" + "long" * 40: jpegs[2]}
    assert not (tmp_path / "tars" / "all.idx").exists()  # DALI takes no blanks
    assert list(damage(tmp_path / "tars")) == []


@pytest.mark.parametrize(
    ("member", "content", "label", "expected"),
    [
        ("cls", [b"2", b"0"], "", ((2,), (0,))),
        ("cls", [b"cat", b"ant"], "", ((1,), (0,))),
        ("json", [b'{"label": 1}', b'{"label": 0}'], "", ((1,), (0,))),
        ("json", [b'{"labels": [1, 0]}', b'{"labels": []}'], "", ((1, 0), ())),
        ("json", [b'{"kind": "b"}', b'{"kind": "a"}'], "kind", ((1,), (0,))),
        ("txt", [b"b\n", b"a\n"], "txt", ((1,), (0,))),
        ("txt", [b"b\n", b"a\n"], "", ((), ())),
    ],
)
def test_adopt__labels_of_every_kind(
    make_jpeg: MakeJpeg, tmp_path: Path, member: str, content: list[bytes], label: str, expected: object
) -> None:
    (tmp_path / "wds").mkdir()
    with webdataset.TarWriter(str(tmp_path / "wds" / "x.tar"), encoder=False) as sink:
        for number, text in enumerate(content):
            sink.write({"__key__": str(number), "jpg": make_jpeg(seed=number), member: text})
    adopt(tmp_path / "wds", None, AdoptConfig(workers=1, label=label))
    with ShardSet.open(tmp_path / "wds") as shard_set:
        assert tuple(shard_set.labels_of(row) for row in range(2)) == expected
    assert list(damage(tmp_path / "wds")) == []


def test_adopt__class_names_from_a_file(foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    _, manifest = adopt(foreign, None, AdoptConfig(workers=1, classes=tmp_path / "names.txt"))
    assert manifest.class_names == ("ant", "bee", "cat", "dog")
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    with pytest.raises(ShardError, match="label 2 is out of range"):
        adopt(foreign, tmp_path / "other", AdoptConfig(workers=1, classes=tmp_path / "names.txt"))


@pytest.mark.parametrize("form", ["tar", "beton"])
def test_adopt__shards_of_ours_have_the_same_rows(whole: Path, images: Path, tmp_path: Path, form: str) -> None:
    convert(images, tmp_path / "set", ConvertConfig(workers=1, shard_bytes=8000, format=form))
    _, manifest = adopt(tmp_path / "set" / f"*.{form}", tmp_path / "again", ONE)
    with ShardSet.open(tmp_path / "again") as again, ShardSet.open(tmp_path / "set") as before:
        rows = np.arange(60)
        assert again.read_checked(rows) == before.read(rows)
        assert [again.key(row) for row in rows] == [before.key(row) for row in rows]
        assert again.label(rows).tolist() == before.label(rows).tolist()
        assert [shard.xxh128 for shard in manifest.shards] == [shard.xxh128 for shard in before.manifest.shards]
    assert list(damage(tmp_path / "again")) == []


class Samples:
    """A data set as FFCV's writer takes it."""

    def __init__(self, pixels: list[np.ndarray]) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, at: int) -> tuple[np.ndarray, int]:
        return self.pixels[at], at % 4


def test_adopt__betons_that_ffcv_wrote(tmp_path: Path) -> None:
    pixels = [np.random.default_rng(at).integers(0, 255, (30, 40 + at, 3), np.uint8) for at in range(10)]
    (tmp_path / "ffcv").mkdir()
    path = tmp_path / "ffcv" / "train.beton"
    fields = {"image": RGBImageField("proportion", compress_probability=0.5), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(Samples(pixels))
    _, manifest = adopt(tmp_path / "ffcv", None, ONE)
    assert manifest.num_samples + manifest.num_quarantined == 10
    assert 0 < manifest.num_samples < 10  # raw pixels are no rows
    assert manifest.format == "beton"
    with ShardSet.open(tmp_path / "ffcv") as shard_set:
        rows = [int(shard_set.key(row).split("/")[1]) for row in range(len(shard_set))]
        assert shard_set.label(np.arange(len(rows))).tolist() == [row % 4 for row in rows]
        assert shard_set.columns.width.tolist() == [40 + row for row in rows]
    assert list(damage(tmp_path / "ffcv")) == []


def test_damage__in_adopted_shards_names_the_sample(foreign: Path) -> None:
    adopt(foreign, None, ONE)
    with ShardSet.open(foreign) as shard_set:
        offset, key = int(shard_set.columns.offset[5]), shard_set.key(5)
    tar = foreign / "train-001.tar"
    data = bytearray(tar.read_bytes())
    data[offset + 9] ^= 1
    tar.write_bytes(data)
    assert f"{tar}, byte {offset}: row 5 ({key}): the image's CRC-32 is wrong" in [
        str(line) for line in damage(foreign)
    ]
    data[offset + 9] ^= 1
    with tarfile.open(tar) as archive:
        at = archive.getmember(f"{key}.cls").offset_data
    data[at] ^= 1
    tar.write_bytes(data)
    assert any(f"row 5 ({key}): 'label' is 2; the shard has 3" in str(line) for line in damage(foreign))
