"""Conversions that ran in parts: the same bytes as from one machine."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maestri.shards.convert import ConvertConfig, convert
from maestri.shards.errors import ShardError
from maestri.shards.merge import merge

ReadAll = Callable[[Path], dict[str, bytes]]
SETTINGS: dict[str, Any] = {"workers": 1, "shard_bytes": 5000}


@pytest.fixture(scope="module")
def source(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images among which two cannot be read."""
    folder = Path(shutil.copytree(images, tmp_path_factory.mktemp("merge") / "source"))
    (folder / "class 0" / "bad.jpg").write_bytes(b"bad")
    (folder / "class 1" / "empty.jpg").write_bytes(b"")
    return folder


@pytest.fixture(scope="module", params=["tar", "beton", "both"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def plain(source: Path, form: str, tmp_path_factory: pytest.TempPathFactory, read_all: ReadAll) -> dict[str, bytes]:
    """Files of the set from one machine."""
    out = tmp_path_factory.mktemp("plain") / "set"
    convert(source, out, ConvertConfig(**SETTINGS, format=form))
    files = read_all(out)
    assert sum(name.endswith((".tar", ".beton")) for name in files) >= 8
    return files


def run_part(source: Path, out: Path, form: str, part: str) -> None:
    assert convert(source, out, ConvertConfig(**SETTINGS, format=form, part=part)) == {}


def test_merge__of_one_folder(
    source: Path, form: str, plain: dict[str, bytes], tmp_path: Path, read_all: ReadAll
) -> None:
    for part in ("2/3", "1/3", "3/3"):
        run_part(source, tmp_path / "set", form, part)
    found = merge(tmp_path / "set")
    assert set(found) == ({"tar", "beton"} if form == "both" else {form})
    assert read_all(tmp_path / "set") == plain
    assert merge(tmp_path / "set") == found


@pytest.mark.parametrize("can_link", [True, False])
def test_merge__of_folders(
    source: Path, form: str, plain: dict[str, bytes], tmp_path: Path, read_all: ReadAll,
    monkeypatch: pytest.MonkeyPatch, can_link: bool,
) -> None:  # fmt: skip
    parts = [tmp_path / name for name in ("a", "b", "c")]
    for number, part in enumerate(parts):
        run_part(source, part, form, f"{number + 1}/3")
    before = read_all(tmp_path)
    if not can_link:
        monkeypatch.setattr(os, "link", _no_links)
    merge(tmp_path / "set", parts)
    assert read_all(tmp_path / "set") == plain
    assert {name: data for name, data in read_all(tmp_path).items() if not name.startswith("set/")} == before


def _no_links(*_: Any) -> None:
    raise OSError(18, "Invalid cross-device link")


def test_merge__into_one_of_the_parts(
    source: Path, form: str, plain: dict[str, bytes], tmp_path: Path, read_all: ReadAll
) -> None:
    run_part(source, tmp_path / "a", form, "1/2")
    run_part(source, tmp_path / "b", form, "2/2")
    merge(tmp_path / "a", [tmp_path / "a", tmp_path / "b"])
    assert read_all(tmp_path / "a") == plain


def test_merge__missing_parts_are_named_and_come_later(
    source: Path, form: str, plain: dict[str, bytes], tmp_path: Path, read_all: ReadAll
) -> None:
    run_part(source, tmp_path / "a", form, "1/3")
    with pytest.raises(ShardError, match="still to run: --part 2/3, --part 3/3"):
        merge(tmp_path / "set", [tmp_path / "a"])
    run_part(source, tmp_path / "b", form, "2/3")
    run_part(source, tmp_path / "c", form, "3/3")
    merge(tmp_path / "set", [tmp_path / "b", tmp_path / "c"])
    assert read_all(tmp_path / "set") == plain


def test_merge__interrupted_it_continues(
    source: Path, form: str, plain: dict[str, bytes], tmp_path: Path, read_all: ReadAll
) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    for number, part in enumerate(parts):
        run_part(source, part, form, f"{number + 1}/2")
    stops = 0

    def stop(_: Any) -> None:
        nonlocal stops
        stops += 1
        raise KeyboardInterrupt

    for _ in range(4):  # each attempt brings one shard
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path / "set", parts, report=stop)
    assert stops == 4
    merge(tmp_path / "set", parts)
    assert read_all(tmp_path / "set") == plain


def test_merge__of_different_conversions(source: Path, tmp_path: Path, read_all: ReadAll) -> None:
    run_part(source, tmp_path / "a", "tar", "1/2")
    convert(source, tmp_path / "b", ConvertConfig(workers=1, shard_bytes=5000, seed=1, part="2/2"))
    run_part(source, tmp_path / "c", "beton", "2/2")
    before = read_all(tmp_path)
    with pytest.raises(ShardError, match="different conversions"):
        merge(tmp_path / "set", [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ShardError, match="different conversions"):
        merge(tmp_path / "a", [tmp_path / "b"])
    with pytest.raises(ShardError, match="converted into beton, other parts into tar"):
        merge(tmp_path / "set", [tmp_path / "a", tmp_path / "c"])
    assert read_all(tmp_path) == before
    assert not (tmp_path / "set").exists()


def test_merge__nothing_to_merge(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(ShardError, match="no finished part"):
            merge(folder)
    with pytest.raises(ShardError, match="a whole set"):
        merge(tmp_path / "set", [whole])
    assert not (tmp_path / "set").exists()
    assert not (tmp_path / "nowhere").exists()


def test_merge__while_a_part_is_being_converted(source: Path, tmp_path: Path) -> None:
    from maestri.shards.journal import Journal

    run_part(source, tmp_path / "set", "tar", "1/2")
    with Journal(tmp_path / "set", ("tar",), part="2/2"), pytest.raises(ShardError, match="another process"):
        merge(tmp_path / "set")
