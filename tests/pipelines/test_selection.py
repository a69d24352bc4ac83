"""Which rows are selected, on sets that the converter made."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maestri.pipelines.selection import SelectionConfig, identity, select_rows, shard_sizes
from maestri.shards.adopt import AdoptConfig, adopt
from maestri.shards.convert import ConvertConfig, convert
from maestri.shards.shard_set import ShardSet

COUNTS = {"ant": 11, "bee": 20, "cat": 30}
"""Images of each class; image 3 of each has a name with a dot and a blank."""


def _jpeg(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def _write(folder: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_jpeg(seed))
    return folder


def _converted(source: Path, out: Path, **settings: Any) -> ShardSet:
    convert(source, out, ConvertConfig(**{"workers": 1, "shard_samples": 9, **settings}))
    return ShardSet.open(out)


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Returns 61 images in three classes and seven shards, called as ImageNet's are: ``ant/ant_7.JPEG``."""
    names = [
        f"{name}/{name} v1.{at}.JPEG" if at == 3 else f"{name}/{name}_{at}.JPEG"
        for name, count in COUNTS.items()
        for at in range(count)
    ]
    folder = tmp_path_factory.mktemp("animals")
    return _converted(_write(folder / "source", names), folder / "set")


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Returns images whose names occur in several folders, one of them of two formats."""
    names = ["a/001.jpg", "a/x/001.jpg", "a/q/b/9.jpg", "b/001.jpg", "b/002.jpg", "b/003.jpg", "b/9.jpg", "b/x/004.jpg"]
    names += ["c/001.jpeg", "c/001.jpg"]
    folder = tmp_path_factory.mktemp("nested")
    return _converted(_write(folder / "source", names), folder / "set")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Returns 24 images; image n has as labels the divisors of n among 2, 3 and 5, so some have none."""
    folder = tmp_path_factory.mktemp("several")
    rows = [{"image": {"bytes": _jpeg(n)}, "labels": [d for d in (2, 3, 5) if n % d == 0]} for n in range(24)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return _converted(folder / "train.parquet", folder / "set", seed=-1)


def _select(shard_set: ShardSet, num_rows: int | None = None, **fields: Any) -> np.ndarray | None:
    return select_rows(shard_set, SelectionConfig(**fields), num_rows=len(shard_set) if num_rows is None else num_rows)


def _names(shard_set: ShardSet, **fields: Any) -> Counter[str]:
    """Returns how many of each class are selected."""
    rows = _select(shard_set, **fields)
    assert rows is not None and rows.dtype == np.int64
    assert (np.diff(rows) > 0).all()
    return Counter(shard_set.manifest.class_names[label] for label in shard_set.label(rows).tolist())


def _listed(shard_set: ShardSet, path: Path, *lines: str, **fields: Any) -> list[str]:
    """Returns the keys that a list of these lines selects."""
    path.write_text("\n".join(lines) + "\n", errors="surrogateescape")
    rows = _select(shard_set, list_file=str(path), **fields)
    assert rows is not None
    return sorted(shard_set.key(row) for row in rows.tolist())


def test_select_rows__everything_is_none(animals: ShardSet, tmp_path: Path) -> None:
    assert _select(animals) is None
    assert _select(animals, 40) is None
    assert _select(animals, classes=("ant", "bee", "cat"), per_class=30, seed=5) is None
    path = tmp_path / "all.txt"
    path.write_text("\n".join(animals.key(row) for row in range(len(animals))))
    assert _select(animals, list_file=str(path)) is None


def test_select_rows__classes_by_name_and_number(animals: ShardSet) -> None:
    assert _names(animals, classes=("bee",)) == {"bee": 20}
    assert _names(animals, classes=("cat", "0")) == {"cat": 30, "ant": 11}
    assert _names(animals, classes=("cat", "cat", "2")) == {"cat": 30}


@pytest.mark.parametrize(
    ("classes", "error"),
    [
        (("bee", "catt"), r"classes holds 'catt', which is none of 3 classes; did you mean 'cat'\?"),
        (("3",), "classes holds '3', which is none of 3 classes"),
        (("-1",), "classes holds '-1'"),
        (("",), "classes holds ''"),
    ],
)
def test_select_rows__refuses_unknown_class(animals: ShardSet, classes: tuple[str, ...], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        _select(animals, classes=classes)


def test_select_rows__refuses_class_that_is_all_held_out(animals: ShardSet) -> None:
    first = animals.manifest.class_names[int(animals.columns.label[0])]
    others = tuple(name for name in COUNTS if name != first)
    with pytest.raises(ValueError, match=f"none of the first 1 samples is of class '{others[0]}' and 1 others"):
        _select(animals, 1, classes=(first, *others))


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(0.001, (1, 1, 1)), (0.1, (2, 2, 3)), (0.35, (4, 7, 11)), (0.5, (6, 10, 15)), (0.99, (11, 20, 30))],
)
def test_select_rows__fraction_of_each_class_rounded_up(
    animals: ShardSet, fraction: float, expected: tuple[int, ...]
) -> None:
    config = SelectionConfig(fraction=fraction)
    rows = select_rows(animals, config, num_rows=61)
    labels = animals.columns.label if rows is None else animals.columns.label[rows]
    assert tuple(np.bincount(labels)) == expected


@settings(deadline=None)
@given(
    fractions=st.tuples(st.floats(1e-9, 1), st.floats(1e-9, 1)),
    seed=st.integers(0, 2**64 - 1),
    limit=st.integers(0, 35),
)
def test_select_rows__smaller_is_contained_in_larger(
    animals: ShardSet, fractions: tuple[float, float], seed: int, limit: int
) -> None:
    def taken(fraction: float) -> set[int]:
        rows = _select(animals, fraction=fraction, per_class=limit, seed=seed)
        return set(range(61)) if rows is None else set(rows.tolist())

    small, large = sorted(fractions)
    assert taken(small) <= taken(large)
    assert len(taken(small)) >= 3


def test_select_rows__per_class(animals: ShardSet) -> None:
    assert _names(animals, per_class=15) == {"ant": 11, "bee": 15, "cat": 15}
    assert _names(animals, per_class=4, classes=("bee", "cat")) == {"bee": 4, "cat": 4}
    assert _names(animals, per_class=4, fraction=0.1) == {"ant": 2, "bee": 2, "cat": 3}


def test_select_rows__seeds_are_splits(animals: ShardSet) -> None:
    splits = [tuple(_select(animals, per_class=3, seed=seed).tolist()) for seed in (0, 1, 2, 0)]
    assert len(set(splits)) == 3 and splits[0] == splits[3]


def test_select_rows__golden_values(animals: ShardSet) -> None:
    # A change here means that published splits of a data set are others: SAMPLE ORDER in the changelog.
    rows = _select(animals, fraction=0.1)
    assert rows.tolist() == [12, 19, 38, 39, 47, 51, 55]
    assert identity(rows) == "da4a3ede7c427bf9"


def test_select_rows__of_an_unlabelled_set(tmp_path: Path) -> None:
    source = _write(tmp_path / "source", [f"{at}.jpg" for at in range(25)])
    with _converted(source, tmp_path / "set") as unlabelled:
        assert len(_select(unlabelled, fraction=0.1)) == 3
        for field, value in (("per_class", 2), ("classes", ("0",))):
            with pytest.raises(ValueError, match=f"data.select.{field} is .*the samples have no labels"):
                _select(unlabelled, **{field: value})


def test_select_rows__any_of_several_labels(several: ShardSet) -> None:
    assert several.manifest.labels == "several"
    for number in (2, 3, 5):
        assert _select(several, classes=(str(number),)).tolist() == [n for n in range(24) if n % number == 0]
    assert _select(several, 10, classes=("3", "5")).tolist() == [0, 3, 5, 6, 9]
    with pytest.raises(ValueError, match="is of class '4'"):
        _select(several, classes=("4",))


def test_select_rows__several_labels_count_by_the_first(several: ShardSet) -> None:
    rows = _select(several, per_class=2)
    assert Counter(several.label(rows).tolist()) == {-1: 2, 2: 2, 3: 2, 5: 1}
    assert 5 in rows, "the only one whose first label is 5"


def test_select_rows__list_of_keys_paths_and_names(animals: ShardSet, tmp_path: Path) -> None:
    lines = ["ant_0.JPEG", "bee/bee_1", "cat/cat_2.JPEG", "/data/train/cat/cat_7.JPEG", "./bee_2", "", "  ant_9.png\r"]
    expected = ["ant/ant_0", "ant/ant_9", "bee/bee_1", "bee/bee_2", "cat/cat_2", "cat/cat_7"]
    assert _listed(animals, tmp_path / "list.txt", "\ufeffant_1.JPEG", *lines) == sorted([*expected, "ant/ant_1"])


@pytest.mark.parametrize("line", ["cat v1.3.JPEG", "cat v1.3", "cat/cat v1.3.JPEG", "cat/cat%20v1%2E3", "cat%20v1%2E3"])
def test_select_rows__list_with_names_that_keys_escape(animals: ShardSet, tmp_path: Path, line: str) -> None:
    assert _listed(animals, tmp_path / "list.txt", line) == ["cat/cat%20v1%2E3"]


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("002.jpg", "b/002"),
        ("a/001.jpg", "a/001"),
        ("a/x/001.jpg", "a/x/001"),
        ("x/001.jpg", "a/x/001"),
        ("/somewhere/b/001.jpg", "b/001"),
        ("q/b/9.jpg", "a/q/b/9"),
        ("b/9.jpg", "b/9"),
        ("c/001.jpeg", "c/001%2Ejpeg"),
        ("c/001.jpg", "c/001%2Ejpg"),
        ("001.jpeg", "c/001%2Ejpeg"),
    ],
)
def test_select_rows__list_prefers_the_whole_path(nested: ShardSet, tmp_path: Path, line: str, key: str) -> None:
    assert _listed(nested, tmp_path / "list.txt", line) == [key]


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (
            ["002.jpg", "005.jpg", "b/001.jpg", "z.jpg"],
            r"2 of 4 lines of .*list.txt are no sample; the first: line 2: '005.jpg'",
        ),
        (["a/002.jpg"], "1 of 1 lines of .* are no sample; the first: line 1: 'a/002.jpg'"),
        (["/"], "no sample; the first: line 1: '/'"),
        (["\udcff\n\x1b[0m"], r"no sample; the first: line 1: '\\udcff'"),
        (["002.jpg", "x.jpg", "001"], "1 of 3 lines .* no sample"),
        (["002.jpg", "001"], "more than one sample; the first: line 2: '001' may be ./(x/)?001 or ./(x/)?001"),
        (["002.jpg", "", "003.jpg", "002.jpg"], "there already; the first: line 4: '002.jpg' is that of line 1"),
        (["b/002", "x/b/002.jpg"], "there already; the first: line 2: 'x/b/002.jpg' is that of line 1"),
        ([" ", ""], "lists no sample"),
    ],
)
def test_select_rows__refuses_lists(nested: ShardSet, tmp_path: Path, lines: list[str], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        _listed(nested, tmp_path / "list.txt", *lines)


def test_select_rows__refuses_file_that_is_not_there(nested: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.select.list_file .*none.txt cannot be read: No such file"):
        _select(nested, list_file=str(tmp_path / "none.txt"))


def test_select_rows__refuses_key_that_is_there_twice(tmp_path: Path) -> None:
    names = ["a/1.jpg", "a/2.jpg"]
    _converted(_write(tmp_path / "source", names), tmp_path / "set").close()
    tars = tmp_path / "tars"
    tars.mkdir()
    for copy in "ab":
        (tars / f"{copy}.tar").write_bytes((tmp_path / "set" / "shard-00000.tar").read_bytes())
    folder, _ = adopt(tars, tmp_path / "adopted", AdoptConfig(workers=1))
    with ShardSet.open(folder) as adopted, pytest.raises(ValueError, match="'a/1' may be a/1 or a/1"):
        _listed(adopted, tmp_path / "list.txt", "a/1")


@pytest.mark.parametrize("chunk", [1, 7, 60])
def test_select_rows__list_looks_at_keys_in_chunks(
    animals: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("maestri.pipelines.selection._CHUNK", chunk)
    keys = [animals.key(row) for row in (0, 6, 7, 13, 14, 59, 60)]
    assert _listed(animals, tmp_path / "list.txt", *(key.split("/")[1] for key in keys)) == sorted(keys)


def test_select_rows__listed_and_held_out_is_left_out(
    animals: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [animals.key(row) for row in (3, 50, 60)]
    assert _listed(animals, tmp_path / "list.txt", *keys, num_rows=50) == keys[:1]
    assert "2 of 3 samples in" in caplog.text
    with pytest.raises(ValueError, match="data.select leaves none of 3 samples"):
        _listed(animals, tmp_path / "list.txt", *keys, num_rows=3)


def test_select_rows__list_and_classes(animals: ShardSet, tmp_path: Path) -> None:
    lines = ["ant_0", "bee_0", "bee_1", "bee_2"]
    assert _listed(animals, tmp_path / "list.txt", *lines, classes=("ant",)) == ["ant/ant_0"]
    assert len(_listed(animals, tmp_path / "list.txt", *lines, per_class=1)) == 2
    with pytest.raises(ValueError, match=r"none of the samples in .*list.txt is of class 'cat'"):
        _listed(animals, tmp_path / "list.txt", *lines, classes=("ant", "cat"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("fraction", 0.0), ("fraction", 1.01), ("fraction", float("nan")), ("per_class", -1), ("seed", -1)],
)
def test_selection_config__refuses(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"data.select.{field} is"):
        SelectionConfig(**{field: value})


@pytest.mark.parametrize("num_rows", [1, 9, 10, 60, 61])
def test_shard_sizes__as_the_index_has_them(animals: ShardSet, num_rows: int) -> None:
    rows = _select(animals, num_rows, per_class=2)
    for chosen in (rows, None):
        shards = animals.columns.shard[np.arange(num_rows) if chosen is None else chosen]
        assert shard_sizes(animals, chosen, num_rows).tolist() == np.bincount(shards, minlength=7).tolist()


def test_identity__of_rows() -> None:
    assert identity(None) == ""
    assert identity(np.array([1, 5])) == identity(np.array([1, 5], ">i8")) != identity(np.array([1, 6]))
