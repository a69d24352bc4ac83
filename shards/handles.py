"""Open files of a set, never too many of them at once."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from maestri.shards.errors import ShardCorrupt

MAX_OPEN = 256
"""Files; a process may usually have 1,024, and a large set has more shards than that."""


class Handles:
    """Files that are opened when first read and closed when others were read since; for threads and forks alike.

    ``pread`` uses no file position, so a forked child may share them.
    """

    def __init__(self, paths: Sequence[str | Path], sizes: Sequence[int] = (), *, max_open: int = MAX_OPEN) -> None:
        """Opens nothing yet.

        Args:
            paths: of the files.
            sizes: bytes that each should have, checked when it is opened; empty for no check.
            max_open: files open at once.
        """
        self._paths = paths
        self._sizes = sizes
        self._max_open = max_open
        self._files: OrderedDict[int, int] = OrderedDict()
        self._closed = False
        self._new_lock()

    def pread(self, number: int, size: int, offset: int) -> bytes:
        """Returns up to ``size`` bytes of a file; fewer only at its end.

        Raises:
            OSError: the storage failed.
            ShardCorrupt: the file has another size than it should.
            ValueError: the files were closed.
        """
        file = self._borrow(number)
        try:
            return os.pread(file, size, offset)
        finally:
            with self._lock:
                self._readers[number] -= 1
                if self._closed:
                    self._close_idle(0)

    def close(self) -> None:
        """Closes the files, each after its last reader."""
        if os.getpid() != self._owner:
            self._new_lock()
        with self._lock:
            self._closed = True
            self._close_idle(0)

    def _borrow(self, number: int) -> int:
        if os.getpid() != self._owner:
            self._new_lock()  # another thread may have held the lock, and borrowed files, when the process was forked
        with self._lock:
            if self._closed:
                raise ValueError("the set of shards is closed")
            file = self._files.get(number)
            if file is None:
                self._close_idle(self._max_open - 1)
                file = self._files[number] = self._open(number)
            self._files.move_to_end(number)
            self._readers[number] = self._readers.get(number, 0) + 1
            return file

    def _open(self, number: int) -> int:
        file = os.open(self._paths[number], os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(file).st_size
        if self._sizes and found != self._sizes[number]:
            os.close(file)
            reason = f"it has {found} bytes; the manifest says {self._sizes[number]}"
            raise ShardCorrupt(self._paths[number], min(found, self._sizes[number]), reason)
        return file

    def _close_idle(self, keep: int) -> None:
        """Closes files that nobody reads, the least recently used first, until ``keep`` are left."""
        excess = len(self._files) - keep
        if excess <= 0:
            return
        for number in [number for number in self._files if not self._readers.get(number)][:excess]:
            os.close(self._files.pop(number))

    def _new_lock(self) -> None:
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._readers: dict[int, int] = {}
