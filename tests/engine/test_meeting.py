"""Ranks that start anew find each other in a store full of the words of dead ones."""

import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from maestri.engine.meeting import agreed_name

TIMEOUT = timedelta(seconds=20)


def start(path: Path, world_size: int, *, missing: int = -1) -> list[str]:
    """Returns the names that ranks get which come in a bad order, rank 0 first and last in turn."""
    names = [""] * world_size

    def come(rank: int) -> None:
        store = dist.FileStore(str(path), -1)
        store.set_timeout(TIMEOUT)
        names[rank] = agreed_name(store, rank=rank, world_size=world_size, timeout=TIMEOUT)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(world_size) if rank != missing]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return names


def test_agreed_name__is_shared_and_never_used_before(tmp_path: Path) -> None:
    seen = set()
    for _ in range(5):
        names = start(tmp_path / "store", 4)
        assert len(set(names)) == 1 and names[0] not in seen
        seen.add(names[0])


def test_agreed_name__after_a_start_that_a_rank_missed(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), -1)
    store.set("maestri/word/1", "of a dead rank")
    store.set("maestri/offer", '["of a dead rank 0", "of a dead rank", "of a dead rank 2"]')
    assert len(set(start(tmp_path / "store", 3))) == 1


def test_agreed_name__gives_up(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), -1)
    store.set("maestri/word/1", "of a dead rank")
    with pytest.raises(ConnectionError, match="not all 2 ranks came within"):
        agreed_name(store, rank=0, world_size=2, timeout=timedelta(seconds=0.5))
