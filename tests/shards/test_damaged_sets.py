"""Damaged manifests and indexes: clear errors or right images, and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from maestri.shards.commands.inspect import inspect
from maestri.shards.commands.repack import RepackConfig
from maestri.shards.commands.repack import repack as repack_command
from maestri.shards.convert import ConvertConfig, convert
from maestri.shards.errors import ShardCorrupt, ShardError
from maestri.shards.shard_set import ShardSet
from maestri.shards.stats import stats
from maestri.shards.verify import damage


def edit(folder: Path, path: tuple[str | int, ...], value: Any) -> None:
    """Replaces a value of a set's manifest."""
    stored = json.loads((folder / "manifest.json").read_text())
    node = stored
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(stored))


def repack(folder: Path, out: Path) -> int:
    return repack_command(folder, out, config=RepackConfig(workers=1))


def test_open__damaged_manifest_or_index_is_a_clear_error(
    whole: Path, tmp_path: Path, load_module: Callable[[str], ModuleType]
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "set"))
    assert list(load_module("set_mutations").problems(folder, 1000)) == []


WRONG: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "source is a text": (("source",), "x", "source is 'x'; expected names and texts"),
    "no images": (("images",), None, "images is None; expected names and texts"),
    "text is a number": (("images", "kept"), 3, "images.kept is 3; expected a text"),
    "seed is a text": (("seed",), "x", "seed is 'x'; expected a whole number from -1"),
    "left out is a list": (("num_quarantined",), [], "num_quarantined is .*; expected a whole number from 0"),
    "more than fits": (("shards", 0, "bytes"), 2**70, "bytes of 'shard-00000.tar' is 1180591620717411303424; expected"),
    "base with NUL": (("base",), "a\0b", "base is 'a.x00b', which no path can be"),
    "base is no UTF-8": (("base",), "\ud800", "manifest.json is damaged"),
    "name with NUL": (("shards", 0, "name"), "a\0b", "name is 'a.x00b', which no path can be"),
    "endless column": (("index", "columns", "label", "offset"), float("inf"), "does not describe its column 'label'"),
    "column offset is a text": (("index", "columns", "keys", "offset"), "64", "does not describe its column 'keys'"),
    "column offset is a fraction": (("index", "columns", "keys", "length"), 1.5, "does not describe its column 'keys'"),
    "classes are numbers": (("class_names",), [1, 2], "the name of class 0 is 1; expected a text"),
    "classes are a text": (("class_names",), "ab", "class_names is no list"),
    "recipe is a list": (("recipe",), ["x"], "recipe is .*; expected a text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_open__value_of_another_kind_is_a_clear_error(whole: Path, tmp_path: Path, name: str) -> None:
    path, value, message = WRONG[name]
    edit(shutil.copytree(whole, tmp_path / "set"), path, value)
    for action in (ShardSet.open, lambda folder: repack(folder, tmp_path / "out")):
        with pytest.raises(ShardError, match=message) as caught:
            action(tmp_path / "set")
        assert "\n" not in str(caught.value)
    assert any(message.partition(" ")[0] in str(line) for line in damage(tmp_path / "set"))


@pytest.mark.parametrize("classes", [[], ["class 0", "class 1"]])
def test_labels__outside_of_the_class_names_are_a_clear_error(whole: Path, tmp_path: Path, classes: list[str]) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "set"))
    edit(folder, ("class_names",), classes)
    with ShardSet.open(folder) as shard_set:
        rows = np.arange(len(shard_set))
        row = int(np.argmax(shard_set.columns.label >= len(classes)))
        label, key = int(shard_set.columns.label[row]), shard_set.key(row)
        at = int(shard_set.manifest.index["columns"]["label"]["offset"]) + 4 * row
        message = f"byte {at}: label {label} of {key} is none of {len(classes)} classes"
        for read in (lambda: shard_set.labels_of(row), lambda: shard_set.multi_hot(rows)):
            with pytest.raises(ShardCorrupt, match=message):
                read()
        with pytest.raises(
            ShardError, match=f"row {row} of the index: label {label} is none of {len(classes)} classes"
        ):
            stats(shard_set)
    with pytest.raises(ShardError, match="is none of"):
        inspect(folder, rows=60)
    with pytest.raises(ShardError, match=f"row {row}: label {label} is none of {len(classes)} classes"):
        repack(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert list(damage(folder)) != []


COLUMNS: dict[str, tuple[str, int, int, str]] = {
    "key ends before it starts": ("key_end", 5, 1, "row 5: its keys are said to be"),
    "key is empty": ("key_end", 0, 0, "row 0: its keys are said to be 0 to 0"),
    "key behind all keys": ("key_end", 7, 2**63, "row 7: its keys are said to be"),
    "keys left over": ("key_end", 59, -1, "row 59: its keys are said to be"),
    "no such label": ("label", 9, 3, "row 9: label 3 is none of 3 classes"),
    "negative label": ("label", 9, -2, "row 9: label -2 is none of 3 classes"),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_repack__damaged_index_is_a_clear_error(whole: Path, tmp_path: Path, name: str) -> None:
    column, row, value, message = COLUMNS[name]
    folder = Path(shutil.copytree(whole, tmp_path / "set"))
    with ShardSet.open(folder) as shard_set:
        values = getattr(shard_set.columns, column)
        at = shard_set.manifest.index["columns"][column]["offset"] + values.itemsize * row
        value = int(values[row]) - 1 if (row, value) == (59, -1) else value
    with (folder / "index.bin").open("r+b") as file:
        file.seek(at)
        file.write(np.array(value, values.dtype).tobytes())
    with pytest.raises(ShardError, match=f"index.bin is damaged: {message}"):
        repack(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_repack__damaged_index_of_several_labels(make_jpeg: Callable[..., bytes], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "labels.csv").write_text("".join(f"{number}.jpg,a;b\n" for number in range(4)))
    for number in range(4):
        (source / f"{number}.jpg").write_bytes(make_jpeg(seed=number))
    convert(source, tmp_path / "set", ConvertConfig(workers=1, labels=tmp_path / "labels.csv"))
    with ShardSet.open(tmp_path / "set") as shard_set:
        columns = shard_set.manifest.index["columns"]
        assert shard_set.multi_hot(np.arange(4)).all()
    whole = (tmp_path / "set" / "index.bin").read_bytes()
    for column, row, value, message in (
        ("label_end", 1, 1, "row 1: its labels are said to be 2 to 1 of 8"),
        ("label_end", 3, 7, "row 3: its labels are said to be 6 to 7 of 8"),
        ("label_values", 5, 2, "row 2: label 2 is none of 2 classes"),
        ("label_values", 0, -1, "row 0: label -1 is none of 2 classes"),
    ):
        dtype = np.dtype(columns[column]["dtype"])
        at = columns[column]["offset"] + dtype.itemsize * row
        content = whole[:at] + np.array(value, dtype).tobytes() + whole[at + dtype.itemsize :]
        (tmp_path / "set" / "index.bin").write_bytes(content)
        with pytest.raises(ShardError, match=message):
            repack(tmp_path / "set", tmp_path / "out")
