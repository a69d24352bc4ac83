"""Listings in columns."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestri.shards.errors import ShardError
from maestri.shards.listing import Listing, Strings

TEXTS = st.lists(st.text(st.characters(codec="utf-8")) | st.just("caf\udce9") | st.just(""), max_size=20)


@given(TEXTS, st.data())
def test_strings__are_those_that_were_given(texts: list[str], data: st.DataObject) -> None:
    strings = Strings.of(texts)
    assert list(strings) == texts == [strings[at] for at in range(len(texts))]
    rows = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=30)) if texts else []
    assert list(strings.take(np.array(rows, np.int64))) == [texts[row] for row in rows]
    assert strings == Strings.of(texts) != Strings.of([*texts, "x"])


def listing(**changes: object) -> Listing:
    columns = Listing(
        keys=Strings.of(["a", "b", "c"]), names=Strings.of(["a.jpg", "b.jpg", "c.jpg"]),
        places=np.arange(9).reshape(3, 3), sizes=np.array([5, 6, 7]), labels=np.array([1, -1, 0], np.int32),
        class_names=("cat", "dog"),
    )  # fmt: skip
    return replace(columns, **changes)


SEVERAL = {"label_ends": np.array([2, 2, 3]), "label_values": np.array([1, 0, 0], np.int32)}


def test_listing__take_keeps_all_columns_together() -> None:
    part = listing(**SEVERAL).take(np.array([2, 0]))
    assert (list(part.keys), list(part.names)) == (["c", "a"], ["c.jpg", "a.jpg"])
    assert part.places.tolist() == [[6, 7, 8], [0, 1, 2]]
    assert (part.sizes.tolist(), part.labels.tolist()) == ([7, 5], [0, 1])
    assert [part.labels_of(at) for at in range(2)] == [(0,), (1, 0)]
    assert listing().labels_of(0) is None


@pytest.mark.parametrize(
    "change",
    [
        {"keys": Strings.of(["a", "bc", ""])}, {"sizes": np.array([5, 6, 8])}, {"class_names": ("cat", "dogs")},
        {"labels": np.array([1, 0, 0], np.int32)}, {"content": "1"}, SEVERAL,
    ],
)  # fmt: skip
def test_digest__changes_with_whatever_decides_bytes(change: dict[str, object]) -> None:
    assert listing(**change).digest() != listing().digest()


def test_digest__does_not_say_where_images_lie() -> None:
    moved = listing(names=Strings.of(["x", "y", "z"]), places=np.zeros((3, 3), np.int64))
    assert moved.digest() == listing().digest()


def test_with_classes__numbers_anew() -> None:
    found = listing(**SEVERAL).with_classes(("bird", "dog", "cat"))
    assert found.labels.tolist() == [1, -1, 2] and found.class_names == ("bird", "dog", "cat")
    assert found.label_values is not None and found.label_values.tolist() == [1, 2, 2]


def test_with_classes__names_a_class_that_is_lacking() -> None:
    with pytest.raises(ShardError, match="class 'cat' is not among the 1 classes given"):
        listing().with_classes(("dog",))
    unused = listing(labels=np.array([1, -1, 1], np.int32))
    assert unused.with_classes(("dog",)).labels.tolist() == [0, -1, 0]
