"""One run at a time in a folder."""

import errno
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maestri.engine.errors import RunError

CANNOT_LOCK = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""What file systems say that know no locks, as Lustre may."""
PATIENCE = 5.0
"""Seconds that a run before may take to end."""


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds a run's folder inside the block; a lock ends with its process.  Does nothing where files can't be locked.

    Raises:
        RunError: another process holds it.
    """
    with (out / ".lock").open("a") as file:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunError(f"another process is training in {out}; end it first (its ranks, too)") from None
                time.sleep(0.2)
            except OSError as error:
                if error.errno not in CANNOT_LOCK:
                    raise
                break
        yield
