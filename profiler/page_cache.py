"""What of a data set the operating system keeps in memory."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from maestri.shards.shard_set import ShardSet


def drop_from_page_cache(shard_set: ShardSet) -> None:
    """Asks the operating system to forget a set's shards; file systems in memory, and some on a network, do not.

    Raises:
        OSError: a shard cannot be opened.
    """
    for handle in _opened(shard_set):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_in_page_cache(shard_set: ShardSet) -> int | None:
    """Returns how many bytes of a set's shards lie in the page cache; None where that is not told.

    Linux tells it only to those who own a file or may write to it, and some file systems to nobody.
    """
    paths = [shard_set.path_of(number) for number in range(len(shard_set.manifest.shards))]
    try:
        if not all(path.stat().st_uid == os.geteuid() or os.access(path, os.W_OK) for path in paths):
            return None
        return sum(_cached_bytes(handle) for handle in _opened(shard_set))
    except OSError:
        return None


def _opened(shard_set: ShardSet) -> Iterator[int]:
    for number in range(len(shard_set.manifest.shards)):
        handle = os.open(shard_set.path_of(number), os.O_RDONLY)
        try:
            yield handle
        finally:
            os.close(handle)


def _cached_bytes(handle: int) -> int:
    length = os.fstat(handle).st_size
    if not length:
        return 0
    with _mapped(handle, length) as address:
        is_cached = np.zeros(-(-length // mmap.PAGESIZE), np.uint8)
        target = is_cached.ctypes.data_as(ctypes.c_void_p)
        # mincore(2): the lowest bit of each page's byte.
        if ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), target):
            raise OSError("mincore failed")
    return int((is_cached & 1).sum()) * mmap.PAGESIZE


@contextmanager
def _mapped(handle: int, length: int) -> Iterator[int]:
    """Yields where a file's pages lie; none of them is read."""
    with mmap.mmap(handle, length, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        pages = np.frombuffer(mapped, np.uint8)
        try:
            yield pages.ctypes.data
        finally:
            del pages  # or the map could not be closed
