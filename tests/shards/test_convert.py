"""Conversions undisturbed, killed, short of disk, and of things that are no images."""

import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from maestri.shards import convert as conversion
from maestri.shards import worker
from maestri.shards.convert import ConvertConfig, Progress, convert
from maestri.shards.errors import ShardError
from maestri.shards.images import KEPT, TRANSCODED
from maestri.shards.manifest import Manifest
from maestri.shards.shard_set import ShardSet
from maestri.shards.sources import open_source

MakeFolder = Callable[[Path, dict[str, bytes]], Path]
ReadAll = Callable[[Path], dict[str, bytes]]
COMMAND = [sys.executable, "-c", "import sys; from maestri.cli.main import main; sys.exit(main())", "shards", "convert"]


@pytest.fixture(scope="session")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An idx3 file of 3,000 images: work enough to be interrupted."""
    folder = tmp_path_factory.mktemp("idx")
    values = np.random.default_rng(0).integers(0, 255, (3000, 48, 48), dtype=np.uint8)
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, *values.shape) + values.tobytes())
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 3000) + bytes(range(100)) * 30)
    return path


@pytest.fixture(scope="session")
def undisturbed(pixels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set made of ``pixels`` by one worker."""
    out = tmp_path_factory.mktemp("sets") / "undisturbed"
    convert(pixels, out, ConvertConfig(workers=1, shard_bytes=500_000))
    return out


def drafts(folder: Path) -> list[str]:
    """Returns files that should not outlive the process that wrote them."""
    return [path.name for path in folder.rglob("*.tmp")] + [path.name for path in folder.glob(".convert/drafts*/*")]


def test_convert__every_image_once_with_its_label(images: Path, whole: Path) -> None:
    with ShardSet.open(whole) as shard_set:
        found = sorted(zip(shard_set.read_checked(np.arange(60)), shard_set.label(np.arange(60)), strict=True))
        assert len(shard_set.manifest.shards) > 2
    expected = [(path.read_bytes(), int(path.relative_to(images).parts[0][-1])) for path in images.rglob("*.jpg")]
    assert found == sorted(expected)


def test_convert__set_names_no_time_host_or_place(images: Path, whole: Path) -> None:
    text = (whole / "manifest.json").read_text()
    assert str(images.parent) not in text and os.uname().nodename not in text
    assert json.loads(text)["source"] == {"kind": "folder", "name": "images"}


@pytest.mark.parametrize("workers", [2, 3])
def test_convert__bytes_do_not_depend_on_workers(
    images: Path, whole: Path, tmp_path: Path, read_all: ReadAll, workers: int
) -> None:
    convert(images, tmp_path / "set", ConvertConfig(workers=workers, shard_bytes=8000))
    assert read_all(tmp_path / "set") == read_all(whole)


def test_convert__seed_changes_the_order_only(images: Path, whole: Path, tmp_path: Path) -> None:
    convert(images, tmp_path / "set", ConvertConfig(workers=1, shard_bytes=8000, seed=1))
    with ShardSet.open(whole) as first, ShardSet.open(tmp_path / "set") as second:
        keys = [[shard_set.key(row) for row in range(60)] for shard_set in (first, second)]
    assert keys[0] != keys[1] and sorted(keys[0]) == sorted(keys[1])


def test_convert__again_changes_nothing(images: Path, tmp_path: Path, read_all: ReadAll) -> None:
    first = convert(images, tmp_path / "set", ConvertConfig(workers=1))
    before = read_all(tmp_path / "set")
    assert convert(images, tmp_path / "set", ConvertConfig(workers=2)) == first
    assert read_all(tmp_path / "set") == before


def test_convert__keeps_bad_images_aside(
    tmp_path: Path, make_folder: MakeFolder, make_jpeg: Callable[..., bytes]
) -> None:
    noise = make_jpeg(200, 200, quality=98)
    good = {f"a/{number}.jpg": make_jpeg(seed=number) for number in range(8)}
    bad = {"a/empty.jpg": b"", "b/cut.jpg": noise[: len(noise) // 2], "b/text.png": b"<html>", "b/t_ext.png": b"<svg>"}
    source = make_folder(tmp_path / "source", good | bad)
    manifest = convert(source, tmp_path / "set", ConvertConfig(workers=2, shard_bytes=3000))["tar"]
    assert (manifest.num_samples, manifest.num_quarantined) == (8, 4)
    listed = [json.loads(line) for line in (tmp_path / "set" / "quarantine.jsonl").read_text().splitlines()]
    assert {entry["source"]: (tmp_path / "set" / entry["kept"]).read_bytes() for entry in listed} == bad
    assert all(entry["reason"] for entry in listed)
    assert sum(shard.num_samples for shard in manifest.shards) == 8


def test_convert__records_what_was_stored(
    tmp_path: Path, make_folder: MakeFolder, make_jpeg: Callable[..., bytes], encode: Callable[..., bytes]
) -> None:
    from PIL import Image

    png = encode(Image.new("RGB", (9, 5)), "PNG")
    source = make_folder(tmp_path / "source", {"kept.jpg": make_jpeg(), "png_named.jpg": png})
    convert(source, tmp_path / "set", ConvertConfig(workers=1))
    with ShardSet.open(tmp_path / "set") as shard_set:
        stored = {shard_set.key(row): int(shard_set.columns.stored[row]) for row in range(2)}
    assert stored == {"kept": KEPT, "png_named": TRANSCODED}


def test_convert__nothing_readable_leaves_nothing(tmp_path: Path, make_folder: MakeFolder) -> None:
    source = make_folder(tmp_path / "source", {f"{number}.jpg": b"not an image" for number in range(3)})
    with pytest.raises(ShardError, match=r"none of the 3 images of .* can be read; the first: \d\.jpg: no known image"):
        convert(source, tmp_path / "set", ConvertConfig(workers=1))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("change", [{"seed": 1}, {"shard_bytes": 9000}, {"check": "header"}])
def test_convert__refuses_another_set(images: Path, whole: Path, change: dict) -> None:
    with pytest.raises(ShardError, match="another source or with other settings"):
        convert(images, whole, ConvertConfig(**{"workers": 1, "shard_bytes": 8000} | change))


def test_convert__refuses_foreign_folders(images: Path, tmp_path: Path, make_folder: MakeFolder) -> None:
    out = make_folder(tmp_path / "out", {"thesis.tex": b""})
    with pytest.raises(ShardError, match="is not empty and holds no set of shards"):
        convert(images, out, ConvertConfig(workers=1))
    with pytest.raises(ShardError, match="Not a directory|File exists"):
        convert(images, out / "thesis.tex", ConvertConfig(workers=1))
    with pytest.raises(ShardError, match="lies inside the source"):
        convert(images, images / "set", ConvertConfig(workers=1))
    assert sorted(path.name for path in out.iterdir()) == ["thesis.tex"]


def test_convert__refuses_a_second_process(images: Path, tmp_path: Path) -> None:
    def again(_: Progress) -> None:
        with pytest.raises(ShardError, match="another process is converting"):
            convert(images, tmp_path / "set", ConvertConfig(workers=1))

    convert(images, tmp_path / "set", ConvertConfig(workers=1), report=again)


def test_convert__dead_worker_is_an_error(pixels: Path, undisturbed: Path, tmp_path: Path, read_all: ReadAll) -> None:
    def kill(progress: Progress) -> None:
        if progress.images:
            for child in multiprocessing.active_children()[:1]:
                child.kill()

    config = ConvertConfig(workers=2, shard_bytes=500_000)
    with pytest.raises(ShardError, match=r"a worker process died.* \(out of memory\?\); run the same command again"):
        convert(pixels, tmp_path / "set", config, report=kill)
    convert(pixels, tmp_path / "set", config)
    assert read_all(tmp_path / "set") == read_all(undisturbed)


def test_convert__dead_worker_names_its_image(
    tmp_path: Path, make_folder: MakeFolder, encode: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    large = encode(Image.new("L", (9000, 9000)), "PNG", compress_level=1)  # a second's work
    source = make_folder(tmp_path / "source", {"a/large.png": large})
    made: list[worker.Counters] = []

    def counters(*args: Any) -> worker.Counters:
        made.append(worker.Counters(*args))
        return made[0]

    def kill(_: Progress) -> None:
        if made[0].entered():
            for child in multiprocessing.active_children():
                child.kill()

    monkeypatch.setattr(conversion, "Counters", counters)
    with pytest.raises(ShardError, match=r"a worker process died at a/large\.png \(out of memory\?\); run the same"):
        convert(source, tmp_path / "set", ConvertConfig(workers=1), report=kill)


def test_convert__unreadable_file_stops_in_one_line(tmp_path: Path, images: Path, make_folder: MakeFolder) -> None:
    source = make_folder(tmp_path / "source", {"1.jpg": b""})
    (source / "2.jpg").symlink_to("/proc/self/mem")  # opens, and fails when it is read
    with pytest.raises(ShardError, match=r"Input/output error: .*/source/2\.jpg"):
        convert(source, tmp_path / "set", ConvertConfig(workers=1))
    assert not drafts(tmp_path)


def workers_of(parent: int) -> set[int]:
    """Returns all descendants of a process."""
    children: dict[int, set[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), set()).add(int(stat.parent.name))
    found, waiting = set(), [parent]
    while waiting:
        more = children.get(waiting.pop(), set()) - found
        found |= more
        waiting += more
    return found


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_convert__killed_and_run_again_gives_the_same_bytes(
    pixels: Path, undisturbed: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    out = tmp_path / "set"
    command = [*COMMAND, str(pixels), str(out), "--workers", "2", "--shard-bytes", "500000"]
    for num_shards in (0, 2, 6):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (out / ".convert" / "conversion.json").exists() or len(list(out.glob("*.tar"))) < num_shards:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        workers = workers_of(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "manifest.json").exists()
        with pytest.raises(ShardError, match="an unfinished conversion: run the same command again"):
            ShardSet.open(out)
        while any(map(is_running, workers)):
            assert time.monotonic() < deadline, "workers outlive the command"
            time.sleep(0.01)
    subprocess.run(command, check=True, capture_output=True)
    assert read_all(out) == read_all(undisturbed)


def test_convert__full_disk_stops_in_one_line_and_goes_on(
    pixels: Path, undisturbed: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    import resource

    out = tmp_path / "set"
    command = [*COMMAND, str(pixels), str(out), "--workers", "2", "--shard-bytes", "500000"]
    limit = 400_000  # bytes a file may have: each shard fails on its way

    def shrink() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    stopped = subprocess.run(command, capture_output=True, text=True, preexec_fn=shrink)
    assert stopped.returncode == 1
    assert stopped.stderr.strip().splitlines()[-1].startswith("maestri shards: File too large")
    assert "Traceback" not in stopped.stderr and "Exception" not in stopped.stderr
    assert not drafts(out) and not list(out.glob("shard*"))
    subprocess.run(command, check=True, capture_output=True)
    assert read_all(out) == read_all(undisturbed)


def test_convert__interrupted_stops_soon(pixels: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    process = subprocess.Popen(
        [*COMMAND, str(pixels), str(out), "--workers", "2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below a shell's background job
    )
    deadline = time.monotonic() + 60
    while not list((out / ".convert" / "drafts").glob("*.tar")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors
    assert not drafts(out) and not list(out.glob("shard*"))


@pytest.mark.parametrize(("name", "value"), [("workers", 0), ("shard_bytes", 0), ("seed", -2), ("seed", 2**63)])
def test_convert_config__refuses(name: str, value: int) -> None:
    with pytest.raises(ShardError, match=rf"--{name.replace('_', '-')} is {value}; expected a number from"):
        ConvertConfig(**{name: value})


def test_convert__class_and_source_names_that_are_not_utf8(tmp_path: Path, make_folder: MakeFolder, make_jpeg) -> None:
    name = os.fsdecode(b"caf\xe9")
    source = make_folder(tmp_path / name, {f"{name}/a.jpg": make_jpeg(), "tea/b.jpg": make_jpeg(seed=1)})
    manifest = convert(source, tmp_path / "out", ConvertConfig(workers=1))["tar"]
    assert set(manifest.class_names) == {name, "tea"}
    with ShardSet.open(tmp_path / "out") as shard_set:
        assert shard_set.manifest == manifest


def test_convert__image_too_large_for_the_memory_is_named(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def store(*_: object, **__: object) -> None:
        raise MemoryError

    source = open_source(images)
    counters = worker.Counters(multiprocessing.get_context("forkserver"), 3)
    monkeypatch.setattr(worker, "store", store)
    storing = worker.Storing(check="decode", bad="quarantine", lossless=False, resize_shorter=0, quality=100)
    for name, value in {"source": source, "counters": counters, "storing": storing}.items():
        monkeypatch.setitem(worker._state, name, value)
    listing = source.listing()
    task = worker.Task(name="shard-00002", number=2, first_sample=0, samples=listing)
    with pytest.raises(ShardError, match="not enough memory") as caught:
        list(worker._samples(task, [], worker._ChecksOf(task)))
    assert str(caught.value).startswith(listing.names[0])
    assert counters.entered() == [(2, 0)]


def full_disk(free: int) -> object:
    return lambda folder: SimpleNamespace(free=free)


def test_convert__no_space_leaves_nothing_and_other_settings_may_fit(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(path.stat().st_size for path in images.rglob("*.jpg"))
    monkeypatch.setattr(shutil, "disk_usage", full_disk(size + 1000))
    out = tmp_path / "set"
    with pytest.raises(ShardError, match="nothing was written"):
        convert(images, out, ConvertConfig(workers=1, format="both"))
    assert not out.exists()
    assert convert(images, out, ConvertConfig(workers=1))["tar"].num_samples == 60
    monkeypatch.setattr(shutil, "disk_usage", full_disk(0))
    convert(images, out, ConvertConfig(workers=1))  # it is there already


def test_convert__given_classes_are_none_without_labels(
    tmp_path: Path, make_folder: MakeFolder, make_jpeg: Callable[..., bytes]
) -> None:
    source = make_folder(tmp_path / "source", {f"{number}.jpg": make_jpeg(seed=number) for number in range(3)})
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    manifest = convert(source, tmp_path / "set", ConvertConfig(workers=1, classes=tmp_path / "names.txt"))["tar"]
    assert (manifest.labels, manifest.class_names) == ("none", ())


def test_convert__killed_after_an_empty_shard_was_dropped(
    tmp_path: Path, make_folder: MakeFolder, make_jpeg: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch,
    read_all: ReadAll,
) -> None:  # fmt: skip
    source = make_folder(tmp_path / "source", {"1.jpg": make_jpeg(), "2.jpg": b"bad", "3.jpg": make_jpeg(seed=3)})
    config = ConvertConfig(workers=1, shard_samples=1, format="both")
    convert(source, tmp_path / "plain", config)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "set", config)
    told = []
    convert(source, tmp_path / "set", config, report=told.append)
    assert told[-1].resumed_images == 3
    assert read_all(tmp_path / "set") == read_all(tmp_path / "plain")
