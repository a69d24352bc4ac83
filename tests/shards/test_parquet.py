"""Parquet as Hugging Face stores it, written by pyarrow."""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maestri.shards import cli
from maestri.shards.convert import ConvertConfig, Progress, convert
from maestri.shards.errors import ShardError
from maestri.shards.images import BadImage
from maestri.shards.listing import Listing
from maestri.shards.merge import merge
from maestri.shards.shard_set import ShardSet
from maestri.shards.sources.parquet import ParquetSource

Jpeg = Callable[..., bytes]
Encode = Callable[..., bytes]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def hf_schema(schema: pa.Schema, **features: Any) -> pa.Schema:
    """Returns a schema with the metadata that ``datasets`` writes."""
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write(path: Path, columns: dict[str, Any], schema: pa.Schema | None = None, **options: Any) -> Path:
    pq.write_table(pa.table(columns, schema=schema), path, **options)
    return path


def hf_file(path: Path, images: list[bytes | None], labels: list[Any], label_type: Any = None, **features: Any) -> Path:
    """Writes a file as ``Dataset.to_parquet`` does."""
    schema = pa.schema([("image", IMAGE), ("label", label_type or pa.int64())])
    rows = [{"bytes": image, "path": f"{at}.jpg"} for at, image in enumerate(images)]
    schema = hf_schema(schema, image={"_type": "Image"}, **features)
    return write(path, {"image": rows, "label": labels}, schema, row_group_size=3)


CLASSES = {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}


def staged(path: Path, folder: Path, **options: Any) -> tuple[ParquetSource, Listing]:
    source = ParquetSource(path, **options)
    source.stage(folder)
    return source, source.listing()


def images_of(source: ParquetSource, listing: Listing) -> list[bytes]:
    """Returns all images as a worker would read them."""
    there = pickle.loads(pickle.dumps(source))
    return [there.load(listing.names[at], listing.places[at]) for at in range(len(listing))]


@pytest.fixture
def images(make_jpeg: Jpeg) -> list[bytes]:
    return [make_jpeg(seed=at) for at in range(40)]


def test_listing__hugging_face(tmp_path: Path, images: list[bytes]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    hf_file(folder / "train-00000-of-00002.parquet", images[:21], [at % 3 for at in range(21)], **CLASSES)
    hf_file(folder / "train-00001-of-00002.parquet", images[21:], [0] * 18 + [-1], **CLASSES)
    source, listing = staged(tmp_path, tmp_path / "spool")
    assert images_of(source, listing) == images
    assert listing.class_names == ("cat", "dog", "eel") and listing.label_ends is None
    assert listing.labels.tolist() == [at % 3 for at in range(21)] + [0] * 18 + [-1]
    assert listing.sizes.tolist() == [len(image) for image in images]
    assert listing.keys[0] == "train-00000-of-00002/00" and listing.names[22] == "train-00001-of-00002.parquet[1]"
    assert len(set(listing.keys)) == 40 and len(pickle.dumps(source)) < 2000


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_listing__plain_binary(tmp_path: Path, images: list[bytes], kind: Any, compression: str) -> None:
    columns = {"x": pa.array(images, kind), "n": list(range(40))}
    path = write(tmp_path / "a.b.parquet", columns, compression=compression, use_dictionary=False)
    source, listing = staged(path, tmp_path / "spool")
    assert images_of(source, listing) == images and listing.class_names == () and set(listing.labels.tolist()) == {-1}
    assert listing.keys[7] == "a%2Eb/07"


LABELS: dict[str, tuple[Any, list[Any], list[int], tuple[str, ...], list[tuple[int, ...]] | None]] = {
    "int8": (pa.int8(), [2, None, 0], [2, -1, 0], ("0", "1", "2"), None),
    "uint64": (pa.uint64(), [2, 1, 0], [2, 1, 0], ("0", "1", "2"), None),
    "string": (pa.string(), ["dog", None, "cat"], [1, -1, 0], ("cat", "dog"), None),
    "large string": (pa.large_string(), ["dog", "é", "cat"], [1, 2, 0], ("cat", "dog", "é"), None),
    "dictionary": (pa.dictionary(pa.int8(), pa.string()), ["b", "a", "b"], [1, 0, 1], ("a", "b"), None),
    "ints": (pa.list_(pa.int32()), [[1, 0], [], None], [1, -1, -1], ("0", "1"), [(1, 0), (), ()]),
    "strings": (pa.list_(pa.string()), [["b"], ["c", "a"], []], [1, 2, -1], ("a", "b", "c"), [(1,), (2, 0), ()]),
    "null": (pa.null(), [None] * 3, [-1] * 3, (), None),
}  # fmt: skip


@pytest.mark.parametrize("case", LABELS)
def test_listing__labels_of_each_type(tmp_path: Path, case: str) -> None:
    kind, values, first, names, several = LABELS[case]
    path = hf_file(tmp_path / "x.parquet", [b"1", b"2", b"3"], values, kind)
    _, listing = staged(path, tmp_path / "spool")
    assert listing.labels.tolist() == first and listing.class_names == names
    assert [listing.labels_of(at) for at in range(3)] == (several or [None] * 3)


@pytest.mark.parametrize(
    "feature",
    [
        {"feature": {"names": ["a", "b"], "_type": "ClassLabel"}, "_type": "Sequence"},
        {"feature": {"names": ["a", "b"], "_type": "ClassLabel"}, "_type": "List"},
        [{"names": ["a", "b"], "_type": "ClassLabel"}],
    ],
)
def test_listing__names_of_several_labels(tmp_path: Path, feature: Any) -> None:
    path = hf_file(tmp_path / "x.parquet", [b"1"], [[1]], pa.list_(pa.int64()), label=feature)
    assert staged(path, tmp_path / "spool")[1].class_names == ("a", "b")


def test_listing__given_class_names(tmp_path: Path) -> None:
    path = hf_file(tmp_path / "x.parquet", [b"1"], ["b"], pa.string())
    assert staged(path, tmp_path / "spool", class_names=("a", "b"))[1].labels.tolist() == [1]


def test_listing__columns_are_chosen(tmp_path: Path) -> None:
    columns = {"left": [b"l"], "right": [b"r"], "fine_label": [1], "coarse": [0]}
    path = write(tmp_path / "x.parquet", columns)
    with pytest.raises(ShardError, match="2 columns that may be images; say --image left or --image right"):
        ParquetSource(path).stage(tmp_path / "spool")
    source, listing = staged(path, tmp_path / "spool", image_column="right", label_column="coarse")
    assert images_of(source, listing) == [b"r"] and listing.labels.tolist() == [0]
    source, listing = staged(path, tmp_path / "spool", image_column="left")
    assert images_of(source, listing) == [b"l"] and listing.labels.tolist() == [1]


def test_listing__two_class_columns_need_a_choice(tmp_path: Path) -> None:
    features = {name: {"names": ["x"], "_type": "ClassLabel"} for name in ("fine_label", "coarse_label")}
    schema = hf_schema(
        pa.schema([("img", IMAGE), ("fine_label", pa.int64()), ("coarse_label", pa.int64())]), **features
    )
    path = write(tmp_path / "x.parquet", {"img": [{"bytes": b"1"}], "fine_label": [0], "coarse_label": [0]}, schema)
    with pytest.raises(ShardError, match="say --label fine_label or --label coarse_label"):
        ParquetSource(path).stage(tmp_path / "spool")


def test_load__row_without_image(tmp_path: Path) -> None:
    schema = pa.schema([("image", IMAGE)])
    rows = [{"bytes": None, "path": "elsewhere.jpg"}, None, {"bytes": b"", "path": ""}, {"bytes": b"1", "path": None}]
    path = write(tmp_path / "x.parquet", {"image": rows}, schema)
    source, listing = staged(path, tmp_path / "spool")
    assert listing.sizes.tolist() == [0, 0, 0, 1]
    for row in (0, 1):
        with pytest.raises(BadImage, match="no image bytes"):
            source.load(listing.names[row], listing.places[row])
    assert [source.load("", place) for place in listing.places[2:]] == [b"", b"1"]


def stats(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_stage__goes_on_where_it_was_interrupted(
    tmp_path: Path, images: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(3):
        hf_file(tmp_path / f"{at}.parquet", images[at * 10 : at * 10 + 10], [at] * 10)
    spool = tmp_path / "spool"
    source, listing = staged(tmp_path, spool)
    before = stats(spool)
    assert set(before) == {f"0000{at}.{kind}" for at in range(3) for kind in ("images", "places")}
    (spool / "00001.places").unlink()
    with (spool / "00002.images").open("r+b") as file:
        file.truncate(100)
    again, second = staged(tmp_path, spool)
    after = stats(spool)
    assert {name for name in before if before[name] != after[name]} == {
        "00001.images", "00001.places", "00002.images", "00002.places",
    }  # fmt: skip
    assert second.digest() == listing.digest() and images_of(again, second) == images[:30]


def test_stage__changed_file_is_copied_anew(tmp_path: Path, images: list[bytes]) -> None:
    path = hf_file(tmp_path / "x.parquet", images[:10], [0] * 10)
    staged(path, tmp_path / "spool")
    hf_file(path, images[10:20], [0] * 10)
    assert images_of(*staged(path, tmp_path / "spool")) == images[10:20]


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"maestri spool 1\n[]\n", b"maestri spool 1\n{}\n" + bytes(32)])
def test_stage__damaged_table_is_written_anew(tmp_path: Path, images: list[bytes], damage: bytes) -> None:
    path = hf_file(tmp_path / "x.parquet", images[:5], [0] * 5)
    staged(path, tmp_path / "spool")
    (tmp_path / "spool" / "00000.places").write_bytes(damage)
    assert images_of(*staged(path, tmp_path / "spool")) == images[:5]


def test_stage__large_row_group_in_little_memory(tmp_path: Path) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    images = [rng.bytes(200_000) for _ in range(400)]
    path = write(
        tmp_path / "x.parquet", {"image": images}, row_group_size=400, use_dictionary=False, write_batch_size=5
    )
    source = ParquetSource(path)
    usual, fresh = pa.default_memory_pool(), pa.system_memory_pool()
    assert fresh.max_memory() < 1 << 20
    pa.set_memory_pool(fresh)
    try:
        source.stage(tmp_path / "spool")
    finally:
        pa.set_memory_pool(usual)
    assert images_of(source, source.listing()) == images
    assert 1 << 20 < fresh.max_memory() < 25_000_000  # of 80 million bytes


def test_stage__disk_full_leaves_no_half_table(
    tmp_path: Path, images: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hf_file(tmp_path / "x.parquet", images[:5], [0] * 5)
    source = ParquetSource(path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("maestri.shards.sources.parquet.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            source.stage(tmp_path / "spool")
    assert list((tmp_path / "spool").iterdir()) == []
    assert images_of(*staged(path, tmp_path / "spool")) == images[:5]


def test_stage__damaged_files(tmp_path: Path, images: list[bytes]) -> None:
    whole = hf_file(tmp_path / "whole.parquet", images[:12], list(range(12))).read_bytes()
    for number, data in enumerate((b"", b"PAR1", whole[:-300], whole[:100] + whole[200:], b"\xff" * 500)):
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(data)
        with pytest.raises(ShardError, match=rf"{number}\.parquet cannot be read as parquet") as caught:
            staged(path, tmp_path / f"spool{number}")
        assert "\n" not in str(caught.value)


def test_stage__flipped_bytes_raise_or_give_rows(tmp_path: Path, images: list[bytes]) -> None:
    import random

    whole = hf_file(tmp_path / "whole.parquet", images[:12], list(range(12))).read_bytes()
    generator = random.Random(0)
    refused = 0
    for number in range(60):
        data = bytearray(whole)
        for _ in range(3):
            data[generator.randrange(len(data))] = generator.randrange(256)
        path = tmp_path / "x.parquet"
        path.write_bytes(data)
        try:
            source, listing = staged(path, tmp_path / "spool")
        except ShardError:
            refused += 1
            continue
        size = (tmp_path / "spool" / "00000.images").stat().st_size
        assert all(offset + max(length, 0) <= size for _, offset, length in listing.places.tolist()), number
    assert refused


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no image": ({"text": ["x"], "label": [1]}, {}, "no column of images"),
    "pixels": ({"image": [[1, 2, 3]]}, {"image_column": "image"}, "'image' is list<"),
    "missing image": ({"image": [b"1"]}, {"image_column": "img"}, "no image column 'img'; it has image"),
    "missing label": ({"image": [b"1"]}, {"label_column": "y"}, "no label column 'y'"),
    "float label": ({"image": [b"1"], "y": [0.5]}, {"label_column": "y"}, "'y' is double; labels are"),
    "large label": ({"image": [b"1"], "label": [1 << 40]}, {}, r"x.parquet\[0\]: label 1099511627776 is out of range"),
    "negative label": ({"image": [b"1"], "label": [-3]}, {}, "label -3 is out of range"),
    "empty": ({"image": pa.array([], pa.binary())}, {}, "holds no rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_listing__what_is_wrong(tmp_path: Path, case: str) -> None:
    columns, options, reason = BAD[case]
    path = write(tmp_path / "x.parquet", columns)
    with pytest.raises(ShardError, match=reason):
        staged(path, tmp_path / "spool", **options)


def test_listing__number_without_a_name(tmp_path: Path) -> None:
    path = hf_file(tmp_path / "x.parquet", [b"1"], [3], **CLASSES)
    with pytest.raises(ShardError, match="label 3 is out of range; class numbers are 0 to 2"):
        staged(path, tmp_path / "spool")


@pytest.mark.parametrize("metadata", [b"", b"[]", b'{"info": 3}', b"\xff", b'{"info": {"features": []}}'])
def test_listing__metadata_that_says_nothing(tmp_path: Path, metadata: bytes) -> None:
    schema = pa.schema([("image", IMAGE), ("label", pa.int64())]).with_metadata({b"huggingface": metadata})
    path = write(tmp_path / "x.parquet", {"image": [{"bytes": b"1"}], "label": [1]}, schema)
    assert staged(path, tmp_path / "spool")[1].class_names == ("0", "1")


def test_listing__files_that_differ(tmp_path: Path) -> None:
    hf_file(tmp_path / "0.parquet", [b"1"], [0], **CLASSES)
    hf_file(tmp_path / "1.parquet", [b"1"], [0], label={"names": ["other"], "_type": "ClassLabel"})
    with pytest.raises(ShardError, match=r"1\.parquet has other columns or classes than .*0\.parquet"):
        staged(tmp_path, tmp_path / "spool")


def test_listing__splits(tmp_path: Path) -> None:
    for name in ("train-0", "test-0"):
        hf_file(tmp_path / f"{name}.parquet", [name.encode()], [0])
    with pytest.raises(ShardError, match="say --split test or --split train"):
        ParquetSource(tmp_path)
    source, listing = staged(tmp_path, tmp_path / "spool", split="test")
    assert images_of(source, listing) == [b"test-0"]


@pytest.mark.parametrize(
    ("train", "val", "features", "expected"),
    [
        ([0, 2, 1], [1, 1], CLASSES, ["cat", "dog", "eel"]),
        ([0, 3, 1], [1, 1], {}, ["0", "1", "2", "3"]),
        (["ant", "cow", "ant"], ["bee", "cow"], {}, ["ant", "bee", "cow"]),
        ([[0, 2], [], [1]], [[1], [2]], {}, ["0", "1", "2"]),
        ([None, None, None], [None, None], {}, []),
    ],
)
def test_convert__several_splits_number_classes_alike(
    tmp_path: Path, jpegs: list[bytes], train: list[Any], val: list[Any], features: dict[str, Any], expected: list[str]
) -> None:
    data = tmp_path / "hub" / "data"
    data.mkdir(parents=True)
    kind = pa.infer_type(train) if train[0] is not None else pa.int64()
    for name, images, labels in (
        ("train-00000-of-00002", jpegs[:2], train[:2]),
        ("train-00001-of-00002", jpegs[2:3], train[2:]),
        ("validation-00000-of-00001", jpegs[3:5], val),
    ):
        hf_file(data / f"{name}.parquet", list(images), labels, kind, **features)
    out = tmp_path / "sets"
    command = ["convert", str(data.parent), str(out), "--split", "train,validation", "--workers", "1", "--seed", "-1"]
    assert cli.run(command) == 0
    for split, images, labels in (("train", jpegs[:3], train), ("validation", jpegs[3:5], val)):
        with ShardSet.open(out / split) as shard_set:
            assert list(shard_set.manifest.class_names) == expected
            assert shard_set.read_checked(np.arange(len(images))) == images
            for row, label in enumerate(labels):
                wanted = [] if label is None else label if isinstance(label, list) else [label]
                wanted = [expected[one] if isinstance(one, int) else one for one in wanted]
                assert [expected[one] for one in shard_set.labels_of(row)] == wanted
    assert not list(out.rglob(".convert"))
    assert cli.run(command) == 0, "it is whole, and stays"


def test_class_names__need_no_staging_and_read_no_labels_where_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_file(tmp_path / "a.parquet", [b"1", b"2"], ["x", "b"], pa.string())
    hf_file(tmp_path / "b.parquet", [b"3"], ["a"], pa.string())
    assert ParquetSource(tmp_path).class_names() == staged(tmp_path, tmp_path / "spool")[1].class_names
    with pytest.raises(ShardError, match=r"b\.parquet\[0\]: 'a' is none of the 2 classes"):
        ParquetSource(tmp_path, class_names=("b", "x")).class_names()
    (tmp_path / "named").mkdir()
    named = hf_file(tmp_path / "named" / "c.parquet", [b"1"], [1], **CLASSES)
    monkeypatch.setattr("maestri.shards.sources.parquet.Labels.add", lambda *_: pytest.fail("labels were read"))
    assert ParquetSource(named).class_names() == ("cat", "dog", "eel")


def test_source__without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ShardError, match=r"pip install 'maestri\[parquet\]'"):
        ParquetSource(tmp_path)


def test_convert__parts_on_a_shared_folder_stage_apart(
    tmp_path: Path, images: list[bytes], read_all: Callable[[Path], dict[str, bytes]]
) -> None:
    source = hf_file(tmp_path / "x.parquet", images, [at % 3 for at in range(40)], **CLASSES)
    settings: dict[str, Any] = {"workers": 1, "shard_samples": 4}
    convert(source, tmp_path / "plain", ConvertConfig(**settings))
    out, started = tmp_path / "set", []

    def other_part(progress: Progress) -> None:
        """Starts the other part while the first is at work, on a machine to which the file looks changed."""
        if not started:
            started.append(progress)
            assert [path.name for path in out.glob(".convert/staged*")] == ["staged-1-of-2"]
            os.utime(source)
            convert(source, out, ConvertConfig(**settings, part="2/2"))
            assert [path.name for path in out.glob(".convert/staged*")] == ["staged-1-of-2"]

    convert(source, out, ConvertConfig(**settings, part="1/2"), report=other_part)
    assert not list(out.glob(".convert/staged*"))  # done with
    merge(out)
    assert read_all(out) == read_all(tmp_path / "plain")


def test_convert__staging_needs_space_too(tmp_path: Path, images: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    source = hf_file(tmp_path / "x.parquet", images, [0] * 40)
    free = int(source.stat().st_size * 1.5)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        patch.setattr(ParquetSource, "stage", lambda *_: pytest.fail("it began"))
        with pytest.raises(ShardError, match="nothing was written"):
            convert(source, tmp_path / "set", ConvertConfig(workers=1))
    assert not (tmp_path / "set").exists()
    staged_once, _ = staged(source, tmp_path / "spool")
    assert staged_once.bytes_to_stage(tmp_path / "spool") == 0
    assert staged_once.bytes_to_stage(tmp_path / "elsewhere") == source.stat().st_size
