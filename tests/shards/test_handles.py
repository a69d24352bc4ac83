import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from maestri.shards.handles import Handles


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Twenty files that hold their own number, a hundred times."""
    for number in range(20):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 100)
    return [tmp_path / str(number) for number in range(20)]


def num_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_pread__never_holds_more_files_than_allowed(paths: list[Path]) -> None:
    before = num_open()
    handles = Handles(paths, max_open=5)
    for number in list(range(20)) * 2:
        assert handles.pread(number, 3, 7) == bytes([number]) * 3
        assert num_open() - before <= 5
    handles.close()
    assert num_open() == before


def test_pread__threads_at_once(paths: list[Path]) -> None:
    handles = Handles(paths, max_open=3)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: handles.pread(number % 20, 100, 0), range(2000)))
    assert found == [bytes([number % 20]) * 100 for number in range(2000)]
    handles.close()


def test_pread__ends_where_the_file_ends(paths: list[Path]) -> None:
    handles = Handles(paths)
    assert handles.pread(3, 50, 90) == bytes([3]) * 10
    handles.close()


def test_pread__after_a_fork_under_lock(paths: list[Path]) -> None:
    handles = Handles(paths)
    handles.pread(0, 1, 0)
    with handles._lock:  # as another thread may hold it at the moment of the fork
        child = os.fork()
        if child == 0:
            os._exit(0 if handles.pread(1, 1, 0) == b"\1" else 1)
    assert os.waitpid(child, 0)[1] == 0
    handles.close()


def test_close__waits_for_readers_and_refuses_later_ones(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    handles = Handles(paths)
    is_reading, may_go_on = threading.Event(), threading.Event()
    pread = os.pread

    def slow(file: int, size: int, offset: int) -> bytes:
        is_reading.set()
        assert may_go_on.wait(10)
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", slow)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(handles.pread, 4, 1, 0)
        assert is_reading.wait(10)
        handles.close()
        may_go_on.set()
        assert future.result() == b"\4"
    with pytest.raises(ValueError, match="closed"):
        handles.pread(4, 1, 0)
