"""``maestri shards convert`` killed, stopped and left without its source, and run again."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maestri.shards.convert import ConvertConfig, convert

ReadAll = Callable[[Path], dict[str, bytes]]
SHARD_BYTES = 60_000
PATIENCE = 60.0


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that take a few milliseconds each, among them two that cannot be read."""
    folder = tmp_path_factory.mktemp("slow") / "source"
    folder.mkdir()
    ramp = np.add.outer(np.arange(700), np.arange(900)).astype(np.uint8)
    for number in range(60):
        Image.fromarray(np.roll(ramp, 7 * number, 1)).save(folder / f"{number:02d}.png", compress_level=1)
    (folder / "broken.jpg").write_bytes(b"not a picture" * 100)
    (folder / "empty.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def undisturbed(slow_source: Path, tmp_path_factory: pytest.TempPathFactory, read_all: ReadAll) -> dict[str, bytes]:
    """The files of a set made by one worker without interruption."""
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    convert(slow_source, out, ConvertConfig(workers=1, shard_bytes=SHARD_BYTES))
    files = read_all(out)
    assert sum(name.endswith(".tar") for name in files) >= 5
    assert sum(name.startswith("quarantine/") for name in files) == 2
    return files


def start(source: Path, out: Path) -> subprocess.Popen[str]:
    """Starts a conversion in a session of its own."""
    command = [Path(sys.executable).with_name("maestri"), "shards", "convert", source, out]
    command += ["--workers", "2", "--shard-bytes", str(SHARD_BYTES)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, start_new_session=True, preexec_fn=heed_ctrl_c)


def heed_ctrl_c() -> None:
    """Undoes what a shell does to commands in the background: they, and all that they start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def members(session: int) -> list[int]:
    """Returns the live processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue  # it has just ended
        if int(its_session) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Waits for something that comes soon."""
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, f"waited {PATIENCE} s for {what}"
        time.sleep(0.01)


def started(source: Path, out: Path) -> subprocess.Popen[str]:
    """Starts a conversion and returns when its first shard is there, and more to do."""
    process = start(source, out)
    wait_until(lambda: list(out.glob("*.tar")) or process.poll() is not None, "a first shard")
    assert process.poll() is None, process.communicate()
    assert not (out / "manifest.json").exists()
    return process


def finish(source: Path, out: Path, expected: dict[str, bytes], read_all: ReadAll) -> None:
    """Runs the command to its end and compares every byte."""
    again = start(source, out)
    stdout, stderr = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, (stdout, stderr)
    assert read_all(out) == expected
    wait_until(lambda: not members(again.pid), "helpers to end with the command")


def error_line(stderr: str) -> str:
    """Returns the only line of an error output."""
    assert stderr.count("\n") == 1, stderr
    return stderr


def test_convert__whole_group_killed_and_run_again(
    slow_source: Path, undisturbed: dict[str, bytes], tmp_path: Path, read_all: ReadAll
) -> None:
    out = tmp_path / "set"
    process = started(slow_source, out)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not members(process.pid), "the killed processes to go")
    assert not (out / "manifest.json").exists()
    finish(slow_source, out, undisturbed, read_all)


def test_convert__ctrl_c_is_one_line_and_run_again(
    slow_source: Path, undisturbed: dict[str, bytes], tmp_path: Path, read_all: ReadAll
) -> None:
    out = tmp_path / "set"
    process = started(slow_source, out)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "interrupted" in error_line(stderr)
    wait_until(lambda: not members(process.pid), "helpers to end with the command")
    assert not list(out.rglob("*.tmp")) and not list(out.glob(".convert/drafts/*"))
    finish(slow_source, out, undisturbed, read_all)


def test_convert__lost_manifest_of_a_finished_set_is_refused(
    slow_source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Without manifest and journal nothing says what the shards are."""
    out = kept_set(undisturbed, tmp_path / "set")
    (out / "manifest.json").unlink()
    with pytest.raises(ValueError, match="not empty"):
        convert(slow_source, out, ConvertConfig(workers=1, shard_bytes=SHARD_BYTES))


def test_convert__source_file_gone_after_listing(
    slow_source: Path, undisturbed: dict[str, bytes], tmp_path: Path, read_all: ReadAll
) -> None:
    source = Path(shutil.copytree(slow_source, tmp_path / "source"))
    out = tmp_path / "set"
    process = started(source, out)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for path in sorted(source.iterdir()):
        path.rename(hidden / path.name)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert re.search(rf"{re.escape(str(source))}/\S+\.(png|jpg)", error_line(stderr))
    for path in hidden.iterdir():
        path.rename(source / path.name)
    finish(source, out, undisturbed, read_all)


def kept_set(files: dict[str, bytes], folder: Path) -> Path:
    """Writes a set's files into a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
