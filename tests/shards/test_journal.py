"""What several processes, and interruptions at the wrong moment, may do to a conversion's folder."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maestri.shards import journal as journals
from maestri.shards.errors import ShardError
from maestri.shards.journal import HEAD, JOURNAL, Journal


def head(recipe: str = "r", part_count: int = 1, **more: Any) -> dict[str, Any]:
    return {"recipe": recipe, "formats": ["tar"], "num_shards": 4, "part_count": part_count, "manifest": {}, **more}


def test_claim__the_first_of_several_parts_counts(tmp_path: Path) -> None:
    with Journal(tmp_path, ("tar",), part="1/2") as one, Journal(tmp_path, ("tar",), part="2/2") as two:
        assert not one.claim(head("first", 2))
        before = (tmp_path / JOURNAL / HEAD).stat().st_ino
        with pytest.raises(ShardError, match="another source or with other settings"):
            two.claim(head("second", 2))
        assert (tmp_path / JOURNAL / HEAD).stat().st_ino == before
        assert not two.claim(head("first", 2))


def test_claim__does_not_replace_a_head_that_came_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def late(source: Path, to: Path) -> None:
        to.write_text('{"recipe": "first", "formats": [], "num_shards": 1, "part_count": 2, "manifest": {}}')
        link(source, to)

    monkeypatch.setattr(os, "link", late)
    with Journal(tmp_path, ("tar",), part="2/2") as journal, pytest.raises(ShardError, match="other settings"):
        journal.claim(head("second", 2))
    assert '"first"' in (tmp_path / JOURNAL / HEAD).read_text()


def test_claim__a_disk_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with Journal(tmp_path, ("tar",)) as journal:
        journal.claim(head())
        assert not list(journal.drafts.iterdir())
    with Journal(tmp_path, ("tar",)) as journal:
        assert journal.head == head()


@pytest.mark.parametrize(("begun", "how"), [(1, "in one go"), (3, "in 3 parts")])
def test_claim__another_number_of_parts(tmp_path: Path, begun: int, how: str) -> None:
    with Journal(tmp_path, ("tar",)) as journal:
        journal.claim(head(part_count=begun))
    with (
        Journal(tmp_path, ("tar",), part="1/2") as journal,
        pytest.raises(ShardError, match=f"is being converted {how}, not in 2 parts"),
    ):
        journal.claim(head(part_count=2))
    with Journal(tmp_path, ("tar",)) as journal:  # one machine may finish what several began
        assert not journal.claim(head())


def test_claim__other_encoders_are_named(tmp_path: Path) -> None:
    with Journal(tmp_path, ("tar",)) as journal:
        journal.claim(head(encoders={"Pillow": "1.0", "libjpeg-turbo": "3.0"}))
        journal.claim(head(encoders={"Pillow": "1.0", "libjpeg-turbo": "3.0"}))
        with pytest.raises(ShardError, match=r"other libraries.*: libjpeg-turbo 3\.0 and 3\.1;"):
            journal.claim(head(encoders={"Pillow": "1.0", "libjpeg-turbo": "3.1"}))


def test_claim__makes_folders_that_a_killed_one_did_not(tmp_path: Path) -> None:
    with Journal(tmp_path, ("tar", "beton")) as journal:
        journal.claim(head())
    for form in ("tar", "beton"):
        (tmp_path / form).rmdir()
    with Journal(tmp_path, ("tar", "beton")) as journal:
        assert not journal.claim(head())
        assert journal.finished() == set()


def test_finished__counts_a_shard_without_images_whose_file_is_gone(tmp_path: Path) -> None:
    record = {"files": {}, "key_bytes": 0, "labels": 0, "bad": []}
    with Journal(tmp_path, ("tar",)) as journal:
        journal.claim(head())
        journal.write_record("shard-00000", record | {"images": 0}, {"bytes": np.zeros(0)})
        journal.write_record("shard-00001", record | {"images": 5}, {"bytes": np.zeros(5)})
        assert journal.finished() == {"shard-00000"}
        assert not list(journal.drafts.iterdir())


def test_record__with_fields_missing(tmp_path: Path) -> None:
    with Journal(tmp_path, ("tar",)) as journal:
        journal.claim(head())
        (tmp_path / JOURNAL / "shard-00000.json").write_text('{"images": 0}')
        with pytest.raises(ShardError, match="has lost its journal"):
            journal.record("shard-00000")
        assert journal.finished() == set()


def test_staged__is_each_parts_own_and_outlives_others(tmp_path: Path) -> None:
    with Journal(tmp_path, ("tar",), part="1/2") as one:
        one.staged.mkdir()
        (one.staged / "x").write_bytes(b"x")
        with Journal(tmp_path, ("tar",), part="2/2") as two:
            assert two.staged != one.staged and two.drafts != one.drafts
    with Journal(tmp_path, ("tar",), part="2/2"):
        pass
    assert (one.staged / "x").exists()
    one.drop_staged()
    with Journal(tmp_path, ("tar",), part="2/2"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_lock__of_a_folder_that_is_removed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, out = journals.fcntl.flock, tmp_path / "set"
    removed = []

    def late(handle: int, how: int) -> None:
        if not removed:
            removed.append(True)
            (out / JOURNAL).rmdir()
            out.rmdir()
        flock(handle, how)

    monkeypatch.setattr(journals.fcntl, "flock", late)
    with Journal(out, ("tar",)) as journal:
        assert journal.drafts.is_dir()
        with pytest.raises(ShardError, match="another process"), Journal(out, ("tar",)):
            pass


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_enter__that_fails_gives_its_locks_back(tmp_path: Path) -> None:
    with Journal(tmp_path, ("tar",)) as journal:
        journal.claim(head())
    (tmp_path / JOURNAL / HEAD).write_text("{")
    before = open_files()
    for _ in range(3):
        with pytest.raises(ShardError, match="cannot be read"), Journal(tmp_path, ("tar",)):
            pass
    assert open_files() == before
    assert (tmp_path / JOURNAL / HEAD).exists()


def test_exit__keeps_a_folder_that_was_there(tmp_path: Path) -> None:
    for out in (tmp_path / "old", tmp_path / "new"):
        if out.name == "old":
            out.mkdir()
        with pytest.raises(ShardError, match="no"), Journal(out, ("tar",)):
            raise ShardError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert list((tmp_path / "old").iterdir()) == []


def test_exit__does_not_hide_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_files()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Journal, "_has_staged", fail)
    with pytest.raises(ShardError, match="the real one"), Journal(tmp_path, ("tar",)):
        raise ShardError("the real one")
    assert open_files() == before
