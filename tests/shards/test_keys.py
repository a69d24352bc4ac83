import tracemalloc
from pathlib import PurePosixPath
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestri.shards.keys import are_unique, escaped, unique_keys
from maestri.shards.listing import Strings

names = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=12)


@given(st.lists(names.filter(lambda name: name not in (".", "..")), min_size=1, max_size=3).map("/".join))
def test_escaped__comes_back_and_is_one_safe_word(path: str) -> None:
    key = escaped(path)
    assert unquote(key, errors="surrogateescape") == path
    assert "." not in key and key.split() == [key]
    assert len(PurePosixPath(key).parts) == len(PurePosixPath(path).parts)


def test_escaped__keeps_bytes_that_are_no_text() -> None:
    path = b"caf\xe9.old".decode("utf-8", "surrogateescape")
    assert escaped(path) == "caf%E9%2Eold"
    assert unquote(escaped(path), errors="surrogateescape") == path


def test_escaped__hides_what_webdataset_takes_for_metadata() -> None:
    assert escaped("__cats__/1") == "%5F_cats__/1"
    assert escaped("__cats/1") == "__cats/1"


@given(st.sets(names.map(lambda name: f"a/{name}.jpg") | names.map(lambda name: f"a/{name}.png"), min_size=1))
def test_unique_keys__are_unique(files: set[str]) -> None:
    assert len(set(unique_keys(sorted(files)))) == len(files)


def test_unique_keys__name_the_extension_only_where_files_differ_in_nothing_else() -> None:
    assert tuple(unique_keys(["a/x.jpg", "a/x.png", "a/y.JPG"])) == ("a/x%2Ejpg", "a/x%2Epng", "a/y")


def test_unique_keys__a_whole_name_may_be_another_files_stem() -> None:
    assert tuple(unique_keys(["a.jpg", "a.jpg.png", "a.png"])) == ("a%2Ejpg", "a%2Ejpg%2Epng", "a%2Epng")


def test_unique_keys__of_strings_in_columns() -> None:
    files = ["a/x.jpg", "a/x.png", "a/y.JPG"]
    assert list(unique_keys(Strings.of(files))) == list(unique_keys(files))
    assert are_unique(Strings.of(files)) and not are_unique(Strings.of([*files, "a/x.png"]))


def test_unique_keys__the_same_path_twice_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="the same path"):
        list(unique_keys(["a.jpg", "a.jpg"]))


def test_unique_keys__need_few_bytes_of_memory_for_each_image() -> None:
    files = Strings.of(f"n01440764/n01440764_{number}.JPEG" for number in range(50_000))
    tracemalloc.start()
    Strings.of(unique_keys(files))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 120 * len(files)
