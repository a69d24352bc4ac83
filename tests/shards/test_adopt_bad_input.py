"""``index``: input that it refuses, and a kill in its middle."""

import fcntl
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from maestri.shards.adopt import AdoptConfig, adopt
from maestri.shards.errors import ShardError
from maestri.shards.shard_set import ShardSet
from maestri.shards.verify import damage

MakeJpeg = Callable[..., bytes]
MakeTars = Callable[[Path, list[bytes]], Path]
ReadAll = Callable[[Path], dict[str, bytes]]
ONE = AdoptConfig(workers=1)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        ("nothing", "holds no .tar and no .beton"),
        ("missing", "there is no"),
        ("two folders", "a set has one"),
        ("both formats", "holds .tar and .beton files"),
        ("empty file", "empty file"),
        ("gzip", "gunzip"),
        ("cut", "cut off"),
        ("only text", "none of the 0 images"),
        ("a set", "holds a set of shards"),
        ("unfinished", "unfinished conversion"),
        ("other idx", "is not the index of train-000.tar"),
        ("locked", "another process"),
    ],
)
def test_adopt__bad_input(foreign: Path, tmp_path: Path, read_all: ReadAll, prepare: str, message: str) -> None:
    source, tar = foreign, foreign / "train-000.tar"
    lock = None
    if prepare == "nothing":
        source = tmp_path / "nothing"
        source.mkdir()
    elif prepare == "missing":
        source = tmp_path / "missing"
    elif prepare == "two folders":
        source = tmp_path / "two"
        for part in ("a", "b"):
            (source / part).mkdir(parents=True)
            os.link(tar, source / part / f"{part}.tar")
    elif prepare == "both formats":
        (foreign / "x.beton").touch()
    elif prepare == "empty file":
        tar.write_bytes(b"")
    elif prepare == "gzip":
        subprocess.run(["gzip", tar], check=True)
        (foreign / "train-000.tar.gz").rename(tar)
    elif prepare == "cut":
        tar.write_bytes(tar.read_bytes()[:3000])
    elif prepare == "only text":
        source = tmp_path / "text"
        source.mkdir()
        with webdataset.TarWriter(str(source / "x.tar"), encoder=False) as sink:
            sink.write({"__key__": "a", "txt": b"text"})
    elif prepare == "a set":
        (foreign / "manifest.json").touch()
    elif prepare == "unfinished":
        (foreign / ".convert").mkdir()
    elif prepare == "other idx":
        (foreign / "train-000.idx").write_text("v1.2 0\n")
    elif prepare == "locked":
        lock = os.open(foreign, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    before = read_all(tmp_path)
    with pytest.raises(ShardError) as caught:
        adopt(source, None, ONE)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert read_all(tmp_path) == before
    if lock is not None:
        os.close(lock)


def test_adopt__an_empty_tar_among_others_is_left_out(foreign: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tarfile.open(foreign / "train-000a.tar", "w"):
        pass
    _, manifest = adopt(foreign, None, ONE)
    assert [shard.name for shard in manifest.shards] == ["train-000.tar", "train-001.tar", "train-002.tar"]
    assert "train-000a.tar" in caplog.text
    assert list(damage(foreign)) == []


def test_adopt__out_that_cannot_be_written(foreign: Path) -> None:
    with pytest.raises(ShardError, match="/proc"):
        adopt(foreign, Path("/proc/set"), ONE)


def test_adopt__killed_in_the_middle_it_leaves_no_set(
    make_jpeg: MakeJpeg, make_tars: MakeTars, tmp_path: Path, read_all: ReadAll
) -> None:
    jpegs = [make_jpeg(1500, 1100, seed=number) for number in range(60)]
    foreign = make_tars(tmp_path / "foreign", jpegs)
    command = [sys.executable, "-c", "import sys; from maestri.cli.main import main; sys.exit(main(sys.argv[1:]))"]
    command += ["shards", "index", str(foreign), str(tmp_path / "set"), "--workers", "2"]
    for seconds in (0.3, 1.0):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not (tmp_path / "set" / "manifest.json").exists():
            with pytest.raises(ShardError):
                ShardSet.open(tmp_path / "set")
    if not (tmp_path / "set" / "manifest.json").exists():
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    adopt(foreign, tmp_path / "undisturbed", AdoptConfig(workers=2))
    assert read_all(tmp_path / "set") == read_all(tmp_path / "undisturbed")
