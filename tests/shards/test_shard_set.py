"""Sets of shards opened and read, whole and damaged."""

import json
import os
import pickle
import shutil
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from maestri.shards import index
from maestri.shards.errors import ShardCorrupt, ShardError
from maestri.shards.manifest import Manifest, ShardInfo
from maestri.shards.shard_set import ShardSet


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A set that may be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "set"))


def edit_manifest(folder: Path, **changes: object) -> None:
    """Changes fields of a manifest."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_open__length_labels_keys_and_bytes_are_the_sources(images: Path, whole: Path) -> None:
    with ShardSet.open(whole) as shard_set:
        rows = np.arange(len(shard_set))
        assert len(shard_set) == 60
        assert len(shard_set.manifest.shards) >= 3
        assert shard_set.manifest.class_names == ("class 0", "class 1", "class 2")
        for row, data in zip(rows.tolist(), shard_set.read_checked(rows), strict=True):
            name = unquote(shard_set.key(row), errors="surrogateescape") + ".jpg"
            assert data == (images / name).read_bytes()
            assert shard_set.manifest.class_names[shard_set.label(rows)[row]] == name.split("/")[0]


def test_read__any_rows_in_any_order(whole: Path) -> None:
    with ShardSet.open(whole) as shard_set:
        everything = shard_set.read(np.arange(60))
        rows = np.array([23, 0, 7, 7, 12])
        assert shard_set.read(rows) == [everything[row] for row in rows]
        assert shard_set.read(np.array([], np.int64)) == []


def test_columns__cannot_be_written(whole: Path) -> None:
    with ShardSet.open(whole) as shard_set, pytest.raises(ValueError, match="read-only"):
        shard_set.columns.label[0] = 1


def test_columns__agree_with_the_stored_bytes(whole: Path) -> None:
    with ShardSet.open(whole) as shard_set:
        columns, stored = shard_set.columns, shard_set.read(np.arange(60))
        assert columns.bytes.tolist() == [len(data) for data in stored]
        assert columns.crc32.tolist() == [zlib.crc32(data) for data in stored]
        assert sorted(columns.width.tolist()) == list(range(20, 80))
        assert (columns.height == 30).all()
        assert (columns.orientation == 1).all()
        assert (np.diff(columns.shard.astype(int)) >= 0).all()


def test_read__threads_at_once(whole: Path) -> None:
    with ShardSet.open(whole) as shard_set:
        everything = shard_set.read(np.arange(60))

        def read(seed: int) -> bool:
            rows = np.random.default_rng(seed).integers(0, 60, 200)
            return shard_set.read_checked(rows) == [everything[row] for row in rows]

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(16)))


def test_read__after_pickling(whole: Path) -> None:
    with ShardSet.open(whole) as shard_set, pickle.loads(pickle.dumps(shard_set)) as twin:
        assert twin.read(np.arange(60)) == shard_set.read(np.arange(60))


def test_close__closes_every_shard(whole: Path) -> None:
    with ShardSet.open(whole) as shard_set:
        before = len(list(Path("/proc/self/fd").iterdir()))
        shard_set.read(np.arange(60))
        assert len(list(Path("/proc/self/fd").iterdir())) == before + len(shard_set.manifest.shards)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    shard_set.close()


def test_read_checked__names_shard_and_key_of_a_flipped_byte(copied: Path) -> None:
    with ShardSet.open(copied) as shard_set:
        row, columns = 13, shard_set.columns
        name = shard_set.manifest.shards[columns.shard[row]].name
        with (copied / name).open("r+b") as file:
            at = int(columns.offset[row]) + 100
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes((byte ^ 1,)))
        others = np.delete(np.arange(60), row)
        assert len(shard_set.read_checked(others)) == 59
        with pytest.raises(ShardCorrupt) as error:
            shard_set.read_checked(np.array([1, row]))
        assert error.value.path == copied / name
        assert error.value.offset == columns.offset[row]
        assert shard_set.key(row) in str(error.value)
        assert len(shard_set.read(np.array([row]))) == 1


def test_read__shard_cut_short_while_open(copied: Path) -> None:
    with ShardSet.open(copied) as shard_set:
        os.truncate(copied / shard_set.manifest.shards[0].name, 600)
        with pytest.raises(ShardCorrupt, match="bytes"):
            shard_set.read(np.array([0, 1]))


def test_shard_corrupt__survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ShardCorrupt("a.tar", 512, "CRC-32 of x is wrong")))
    assert isinstance(error, ShardCorrupt)
    assert (error.path, error.offset, error.reason) == (Path("a.tar"), 512, "CRC-32 of x is wrong")
    assert str(error) == "a.tar, byte 512: CRC-32 of x is wrong"


def lose_index(folder: Path) -> None:
    (folder / index.FILE_NAME).unlink()


def empty_index(folder: Path) -> None:
    (folder / index.FILE_NAME).write_bytes(b"")


def cut_index(folder: Path) -> None:
    os.truncate(folder / index.FILE_NAME, 500)


def cut_index_at_its_head(folder: Path) -> None:
    os.truncate(folder / index.FILE_NAME, 10)


def overwrite_index_head(folder: Path) -> None:
    content = bytearray((folder / index.FILE_NAME).read_bytes())
    content[:4] = b"PNG!"
    (folder / index.FILE_NAME).write_bytes(content)


def change_count(folder: Path) -> None:
    edit_manifest(folder, num_samples=59)


def lose_shard(folder: Path) -> None:
    (folder / "shard-00001.tar").unlink()


def cut_shard(folder: Path) -> None:
    os.truncate(folder / "shard-00001.tar", 1024)


def lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def cut_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 100)


def change_version(folder: Path) -> None:
    edit_manifest(folder, format_version=3)


def change_format(folder: Path) -> None:
    edit_manifest(folder, kind="something else")


def misspell_a_field(folder: Path) -> None:
    edit_manifest(folder, sedd=1)


def lose_columns(folder: Path) -> None:
    edit_manifest(folder, index={})


def make_manifest_a_list(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def write_binary_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\xff\xfe\x00")


def step_outside(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["name"] = "../elsewhere.tar"
    edit_manifest(folder, shards=manifest["shards"])


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lose_index, "index.bin"), (empty_index, "index.bin"), (cut_index, "index.bin"),
        (cut_index_at_its_head, "index.bin"), (overwrite_index_head, "index.bin"), (change_count, "manifest.json"),
        (lose_shard, "shard-00001.tar"), (lose_manifest, "manifest.json"),
        (cut_manifest, "manifest.json"), (change_version, "version 3"), (change_format, "manifest.json"),
        (misspell_a_field, "sedd"), (lose_columns, "columns"), (make_manifest_a_list, "manifest.json"),
        (write_binary_manifest, "manifest.json"), (step_outside, "elsewhere.tar"),
    ],
)  # fmt: skip
def test_open__damaged_set_is_refused_in_one_line(copied: Path, damage: Callable[[Path], None], names: str) -> None:
    damage(copied)
    with pytest.raises(ShardError, match=names) as error:
        ShardSet.open(copied)
    assert "\n" not in str(error.value)


def test_read__shard_of_another_size_is_refused(copied: Path) -> None:
    """When it is first read: opening a set opens no shard."""
    cut_shard(copied)
    with ShardSet.open(copied) as shard_set:
        row = int(np.flatnonzero(shard_set.columns.shard == 1)[0])
        with pytest.raises(ShardCorrupt, match="shard-00001.tar.*it has 1024 bytes; the manifest says"):
            shard_set.read(np.array([row]))


def test_open__missing_folder_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="maestri shards convert"):
        ShardSet.open(tmp_path / "nowhere")


def test_open__folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="not a set of shards"):
        ShardSet.open(tmp_path)


def test_open__large_index_is_not_scanned(tmp_path: Path) -> None:
    """1.3 million rows, as ImageNet-1K has; the shard is a hole."""
    num_rows, size = 1_300_000, 100
    rows = np.arange(num_rows)
    columns = {name: np.zeros(num_rows, np.int64) for name in index.COLUMNS if name != "key_end"}
    columns |= {"offset": rows * size, "bytes": np.full(num_rows, size), "key_bytes": np.full(num_rows, 7)}
    columns["keys"] = np.frombuffer(b"".join(b"%07d" % row for row in range(num_rows)), np.uint8)
    layout = index.layout_of(num_rows, key_bytes=7 * num_rows)
    draft = index.IndexDraft(tmp_path / index.FILE_NAME, num_rows, layout)
    draft.add(columns)
    draft.close()
    with (tmp_path / "a.tar").open("wb") as file:
        file.truncate(num_rows * size)
    Manifest(
        source={"kind": "folder", "name": "none"}, format="tar", labels="none", class_names=(), num_samples=num_rows,
        num_quarantined=0, images={}, seed=0, index={"columns": layout}, recipe="",
        shards=(ShardInfo(name="a.tar", bytes=num_rows * size, num_samples=num_rows, xxh128=""),),
    ).write(tmp_path)  # fmt: skip
    start = time.process_time()
    with ShardSet.open(tmp_path) as shard_set:
        assert shard_set.key(num_rows - 1) == "1299999"
        assert shard_set.read(np.array([num_rows - 1])) == [bytes(size)]
    assert time.process_time() - start < 0.5
