"""A run that is killed, and goes on with another number of ranks, sees what an undisturbed one sees."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from maestri.shards.convert import ConvertConfig, convert

pytestmark = pytest.mark.long

PROGRAM = Path(__file__).with_name("loader_program.py")
GLOBAL_SIZE = 48


@pytest.fixture(scope="module")
def shards(make_photos: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a set of 100 photographs in seven shards: no epoch ends with a batch."""
    folder = tmp_path_factory.mktemp("elastic")
    for row, data in enumerate(make_photos(100, smallest=30, largest=90).encoded):
        path = folder / "source" / f"{row % 5}" / f"{row:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    convert(folder / "source", folder / "set", ConvertConfig(workers=1, shard_samples=16))
    return folder / "set"


def _start(shards: Path, executor: str, *jobs: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), str(shards), executor, *jobs]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below a shell's background job
    )


def _samples(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("executor", ["threads", "dali"])
def test_loader__killed_and_continued_on_other_numbers_of_ranks(shards: Path, tmp_path: Path, executor: str) -> None:
    # Two ranks go on until they are killed; each step of theirs has a half of the batch.
    half = GLOBAL_SIZE // 2
    killed = [_start(shards, executor, f"{tmp_path}/killed{rank}:{rank}:2:0:1000") for rank in (0, 1)]
    files = [tmp_path / f"killed{rank}" for rank in (0, 1)]
    # Meanwhile one rank does it undisturbed, and then each step once more with another number of ranks.
    jobs = [f"{tmp_path}/whole:0:1:0:6"]
    for step, world in enumerate((3, 4, 8, 1, 2), start=1):
        jobs += [f"{tmp_path}/world{world}:{rank}:{world}:{step * GLOBAL_SIZE}:1" for rank in range(world)]
    with _start(shards, executor, *jobs) as process:
        error = process.communicate(timeout=240)[1]
        assert process.returncode == 0, error
    deadline = time.monotonic() + 60
    while any(not file.exists() or file.read_text().count("\n") < half for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for process in killed:
        with process:
            process.send_signal(signal.SIGKILL)
    whole = _samples(tmp_path / "whole")
    expected = {sample["position"]: sample for sample in whole}
    assert [sample["position"] for sample in whole] == list(range(6 * GLOBAL_SIZE))
    for file in files:
        lines = file.read_text().splitlines()
        num_whole = min(len(lines) // half, 6) * half
        assert num_whole >= half
        for line in lines[:num_whole]:
            sample = json.loads(line)
            assert sample == expected[sample["position"]]
    for step, world in enumerate((3, 4, 8, 1, 2), start=1):
        assert _samples(tmp_path / f"world{world}") == whole[step * GLOBAL_SIZE : (step + 1) * GLOBAL_SIZE]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("executor", ["threads", "dali"])
@pytest.mark.parametrize(
    ("end", "code"), [("SIGINT", -signal.SIGINT), ("SIGTERM", -signal.SIGTERM), ("raise", 1), ("leave", 0)]
)
def test_loader__a_process_ends_cleanly(shards: Path, tmp_path: Path, executor: str, end: str, code: int) -> None:
    is_signal = end.startswith("SIG")
    with _start(shards, executor, f"{tmp_path}/out:0:1:0:{'wait' if is_signal else end}") as process:
        if is_signal:
            assert process.stdout is not None
            assert process.stdout.readline() == "waiting\n"
            process.send_signal(getattr(signal, end))
            began = time.monotonic()
        error = process.communicate(timeout=60)[1]
    assert process.returncode == code, error
    if is_signal:
        assert time.monotonic() - began < 15
    assert ("RuntimeError: in the loop" in error) == (end == "raise")
    if end == "leave":
        assert error == ""
    assert "terminate called" not in error and "Fatal Python error" not in error
