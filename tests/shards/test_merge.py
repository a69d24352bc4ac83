"""Conversions that ran in parts: the same bytes as from one machine."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maestri.shards import convert as conversion
from maestri.shards.convert import ConvertConfig, convert
from maestri.shards.errors import ShardError
from maestri.shards.journal import JOURNAL, Journal
from maestri.shards.manifest import Manifest
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
    run_part(source, tmp_path / "set", "tar", "1/2")
    with Journal(tmp_path / "set", ("tar",), part="2/2"), pytest.raises(ShardError, match="another process"):
        merge(tmp_path / "set")


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("lost", ["nothing", "head", "records"])
@pytest.mark.parametrize("with_parts", [True, False])
def test_merge__killed_before_the_journal_is_gone(
    source: Path, form: str, plain: dict[str, bytes], tmp_path: Path, read_all: ReadAll,
    monkeypatch: pytest.MonkeyPatch, lost: str, with_parts: bool,
) -> None:  # fmt: skip
    parts = [tmp_path / "a", tmp_path / "b"]
    for number, part in enumerate(parts):
        run_part(source, part, form, f"{number + 1}/2")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path / "set", parts)
    journal = tmp_path / "set" / JOURNAL
    for path in journal.glob({"head": "conversion.json", "records": "shard-*", "nothing": "none"}[lost]):
        path.unlink()
    assert set(merge(tmp_path / "set", parts if with_parts else ())) == ({"tar", "beton"} if form == "both" else {form})
    assert read_all(tmp_path / "set") == plain
    assert not journal.exists()


def test_merge__killed_after_empty_shards_were_dropped(
    source: Path, tmp_path: Path, read_all: ReadAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"workers": 1, "shard_samples": 1, "format": "both"}
    convert(source, tmp_path / "plain", ConvertConfig(**config))
    for part in ("1/2", "2/2"):
        convert(source, tmp_path / "set", ConvertConfig(**config, part=part))
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path / "set")
    shutil.copytree(tmp_path / "set", tmp_path / "again")
    merge(tmp_path / "other", [tmp_path / "again"])
    merge(tmp_path / "set")
    assert read_all(tmp_path / "set") == read_all(tmp_path / "other") == read_all(tmp_path / "plain")


def test_merge__into_another_whole_set(source: Path, whole: Path, tmp_path: Path, read_all: ReadAll) -> None:
    for part in ("1/2", "2/2"):
        run_part(source, tmp_path / part[0], "tar", part)
    out = Path(shutil.copytree(whole, tmp_path / "set"))
    before = read_all(out)
    with pytest.raises(ShardError, match="made from another source or with other settings"):
        merge(out, [tmp_path / "1", tmp_path / "2"])
    assert read_all(out) == before


@pytest.mark.parametrize("can_link", [True, False])
def test_merge__a_shard_that_is_not_what_was_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_link: bool
) -> None:
    for part in ("1/2", "2/2"):
        run_part(source, tmp_path / part[0], "tar", part)
    shard = sorted((tmp_path / "2").glob("*.tar"))[0]
    data = bytearray(shard.read_bytes())
    if not can_link:
        monkeypatch.setattr(os, "link", _no_links)
        data[600] ^= 1
        shard.write_bytes(data)
        with pytest.raises(ShardError, match=f"{shard.name} has other bytes than were written"):
            merge(tmp_path / "set", [tmp_path / "1", tmp_path / "2"])
    shard.write_bytes(data[:-512])
    with pytest.raises(ShardError, match=f"{shard.name} has [0-9,]+ bytes, not"):
        merge(tmp_path / "set", [tmp_path / "1", tmp_path / "2"])
    assert not (tmp_path / "set" / shard.name).exists()


@pytest.mark.parametrize(
    "kept", ["../../outside.txt", "/etc/hostname", "quarantine/../../x.bin", "quarantine/1.bin", 7]
)
def test_merge__a_part_that_names_files_elsewhere(source: Path, tmp_path: Path, kept: object) -> None:
    run_part(source, tmp_path / "a", "tar", "1/1")
    for path in (tmp_path / "a" / JOURNAL).glob("shard-*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"bad": [one | {"kept": kept} for one in record["bad"]]}))
    with pytest.raises(ShardError, match="names a file outside its quarantine"):
        merge(tmp_path / "set", [tmp_path / "a"])


@pytest.mark.parametrize("what", ["quarantine", "quarantine/*.bin", "*.tar"])
def test_merge__takes_no_symbolic_links(source: Path, tmp_path: Path, what: str) -> None:
    run_part(source, tmp_path / "a", "tar", "1/1")
    path = next((tmp_path / "a").glob(what))
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ShardError, match="is a symbolic link"):
        merge(tmp_path / "set", [tmp_path / "a"])


def test_merge__of_parts_from_other_libraries(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_part(source, tmp_path / "a", "tar", "1/2")
    monkeypatch.setattr(conversion, "encoders", lambda: {"Pillow": "0.1"})
    with pytest.raises(ShardError, match=r"other libraries.*: Pillow \S+ and 0\.1, libjpeg-turbo \S+ and none"):
        run_part(source, tmp_path / "a", "tar", "2/2")
    run_part(source, tmp_path / "b", "tar", "2/2")
    with pytest.raises(ShardError, match=r"other libraries.*Pillow \S+ and 0\.1"):
        merge(tmp_path / "set", [tmp_path / "a", tmp_path / "b"])
    assert not (tmp_path / "set").exists()
