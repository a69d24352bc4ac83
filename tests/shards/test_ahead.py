"""Images checked ahead of the process that writes their shard."""

import functools
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestri.shards import convert as conversion
from maestri.shards import worker
from maestri.shards.ahead import Checks, Remainder
from maestri.shards.convert import ConvertConfig, convert
from maestri.shards.images import StoredImage, store
from maestri.shards.journal import Journal
from maestri.shards.listing import Listing, Strings
from maestri.shards.sources import open_source

MakeJpeg = Callable[..., bytes]
MakeFolder = Callable[[Path, dict[str, bytes]], Path]
ReadAll = Callable[[Path], dict[str, bytes]]


def damaged(data: bytes) -> bytes:
    """Returns a JPEG whose last third is gone, end marker and all but that being in place."""
    return data[: 2 * len(data) // 3] + b"\xff\xd9"


def listing_of(first: int, last: int) -> Listing:
    """Returns a listing of samples that are called by their numbers."""
    names = Strings.of(str(at) for at in range(first, last))
    count = last - first
    return Listing(
        keys=names,
        names=names,
        places=np.zeros((count, 3), np.int64),
        sizes=np.ones(count, np.int64),
        labels=np.full(count, -1, np.int32),
        class_names=(),
    )


def test_checks__holds_for_the_same_bytes_at_the_same_place(tmp_path: Path) -> None:
    (tmp_path / "checks").touch()
    with Checks(tmp_path / "checks") as one, Checks(tmp_path / "checks") as other:
        one.begin(5)
        one.begin(3)
        assert other.looked_at() == [3, 5]
        assert not other.has(5, b"bytes")
        one.end(5, b"bytes")
        one.end(3, None)
        assert other.looked_at() == []
        assert other.has(5, b"bytes")
        assert not other.has(5, b"other")
        assert not any(other.has(at, b"bytes") for at in (0, 3, 4, 6, 100))


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=4), st.integers(0, 2**32))
def test_remainder__pieces_come_from_the_end_and_meet_the_writer(counts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    at = {task: int(rng.integers(0, count)) for task, count in enumerate(counts) if count}
    remainder = Remainder(lambda: list(at.items()), lambda task: counts[task], lambda _, *ends: listing_of(*ends))
    ends = dict(enumerate(counts))
    while (piece := remainder.take()) is not None:
        names = [int(name) for name in piece.samples.names]
        assert names == list(range(piece.first, ends[piece.task]))
        assert len(names) >= 32
        assert piece.first > at[piece.task]
        ends[piece.task] = piece.first
        at[piece.task] = min(at[piece.task] + int(rng.integers(0, 40)), counts[piece.task] - 1)
    assert all(ends[task] - position - 1 < 64 for task, position in at.items())


@pytest.fixture
def conversion_of(tmp_path: Path, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Returns what begins a conversion of files in this process, and gives its plan, journal and counters."""

    def begin(files: dict[str, bytes]) -> tuple[Any, Journal, worker.Counters]:
        source = open_source(make_folder(tmp_path / "source", files))
        config = ConvertConfig(workers=1, seed=-1)
        plan = conversion._Plan(source.listing(), config)
        journal = Journal(tmp_path / "set", ("tar",))
        journal.drafts.mkdir(parents=True)
        counters = worker.Counters(multiprocessing.get_context("forkserver"), plan.num_shards)
        state = {"source": source, "journal": journal, "counters": counters, "storing": conversion._storing(config)}
        for name, value in state.items():
            monkeypatch.setitem(worker._state, name, value)
        return plan, journal, counters

    return begin


def test_check__writer_decodes_what_is_damaged_or_has_changed(
    conversion_of: Callable[..., Any], make_jpeg: MakeJpeg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{at:03d}.jpg": make_jpeg(40, 40, seed=at) for at in range(100)}
    files["090.jpg"] = damaged(files["090.jpg"])
    plan, journal, counters = conversion_of(files)
    counters.enter(0, 20)
    job = conversion._checks_ahead(journal, plan, counters)()
    assert isinstance(job, functools.partial)
    job()
    (tmp_path / "source" / "095.jpg").write_bytes(damaged(files["095.jpg"]))  # after it was checked
    decoded = []

    def told(found: bytes, *, check: str, **settings: Any) -> StoredImage:
        if check == "decode":
            decoded.append(found)
        return store(found, check=check, **settings)

    monkeypatch.setattr(worker, "store", told)
    bad: list[dict[str, str]] = []
    with worker._ChecksOf(plan.task(0)) as checks:
        written = [sample.image.data for sample in worker._samples(plan.task(0), bad, checks)]
    first = job.args[0].first
    assert first == 68
    expected = [*list(files.values())[:first], files["090.jpg"], damaged(files["095.jpg"])]
    assert decoded == expected
    assert [entry["source"] for entry in bad] == ["090.jpg", "095.jpg"]
    assert written == [data for name, data in files.items() if name not in ("090.jpg", "095.jpg")]


def test_check__ends_where_the_writer_is_done_or_all_are_to_stop(
    conversion_of: Callable[..., Any], make_jpeg: MakeJpeg
) -> None:
    files = {f"{at:03d}.jpg": make_jpeg(40, 40, seed=at) for at in range(100)}
    plan, journal, counters = conversion_of(files)
    counters.enter(0, 20)
    job = conversion._checks_ahead(journal, plan, counters)()
    assert job is not None
    checks = journal.checks("shard-00000")
    counters.enter(0, -1)
    job()
    assert checks.read_bytes() == b""
    counters.enter(0, 98)
    job()
    with Checks(checks) as found:
        assert [at for at, data in enumerate(files.values()) if found.has(at, data)] == [99]
    checks.unlink()
    job()
    assert not checks.exists(), "the shard is in place, and nothing of it comes back"
    checks.touch()
    counters.enter(0, 20)
    counters.stop()
    job()
    assert checks.read_bytes() == b""


def test_names_at__images_that_were_checked_ahead_are_named(
    conversion_of: Callable[..., Any], make_jpeg: MakeJpeg
) -> None:
    plan, journal, counters = conversion_of({f"{at:03d}.jpg": make_jpeg(seed=at) for at in range(100)})
    counters.enter(0, 20)
    assert conversion._names_at(journal, plan, counters) == " at 020.jpg"
    journal.checks("shard-00000").touch()
    with Checks(journal.checks("shard-00000")) as checks:
        checks.begin(77)
    assert conversion._names_at(journal, plan, counters) == " at 020.jpg or 077.jpg"


def test_convert__idle_workers_check_the_last_shard(
    tmp_path: Path, make_folder: MakeFolder, make_jpeg: MakeJpeg, read_all: ReadAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = make_jpeg(1200, 900)  # some milliseconds each
    files = {f"{at:03d}.jpg": large if at % 9 else damaged(large) for at in range(400)}
    source = make_folder(tmp_path / "source", files)
    made: list[worker.Counters] = []

    def counters(*args: Any) -> worker.Counters:
        made.append(worker.Counters(*args))
        return made[-1]

    monkeypatch.setattr(conversion, "Counters", counters)
    for workers in (1, 3):
        convert(source, tmp_path / str(workers), ConvertConfig(workers=workers))
    assert [one.is_helped(0) for one in made] == [False, True]
    found = read_all(tmp_path / "3")
    assert found == read_all(tmp_path / "1")
    assert json.loads(found["manifest.json"])["num_quarantined"] == 45
    assert not [name for name in found if ".convert" in name]
