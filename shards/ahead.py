"""The last shards' images, checked by workers that have no shard left to write.

There are seldom as many shards as workers, or twice as many: at the end some write and others would wait.  Those check
images of a shard that is being written, from its end on, and leave the checksums of bytes that are whole in a file
beside the draft.  The writer need not decode bytes with such a checksum; whatever else it finds in its way, it checks
itself.  So neither waits for the other, and a shard's bytes don't depend on any of it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import xxhash

from maestri.shards.listing import Listing

_MIN_IMAGES = 32
"""What is handed out at least: asking for so many takes far less time than checking them."""
_FRACTION = 8
"""Of the images that are left, one in so many is handed out at a time."""
_SIZE = 16
_NOT_LOOKED_AT, _LOOKED_AT = bytes(_SIZE), b"\xff" * _SIZE


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Images of a shard that is being written, for another process to check."""

    task: int
    """Of the shard."""
    first: int
    """The first image's position in the shard."""
    samples: Listing
    """The images."""


class Checks:
    """Which images of a shard are whole: a file of 16 bytes for each, which several processes may have open."""

    def __init__(self, path: Path) -> None:
        """Opens a file that is there; an empty one will do."""
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def __enter__(self) -> "Checks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, at: int) -> None:
        """Says that an image is being looked at."""
        self._write(at, _LOOKED_AT)

    def end(self, at: int, data: bytes | None) -> None:
        """Says that an image's bytes are whole, or by None that nothing is known of it."""
        self._write(at, _NOT_LOOKED_AT if data is None else xxhash.xxh3_128_digest(data))

    def has(self, at: int, data: bytes) -> bool:
        """Returns whether an image had these bytes, and they were whole."""
        return os.pread(self._file, _SIZE, _SIZE * at) == xxhash.xxh3_128_digest(data)

    def looked_at(self) -> list[int]:
        """Returns which images are being looked at: after a worker's death, one of them may have been its end."""
        found = os.pread(self._file, os.fstat(self._file).st_size, 0)
        return [at for at in range(len(found) // _SIZE) if found[_SIZE * at : _SIZE * (at + 1)] == _LOOKED_AT]

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def _write(self, at: int, content: bytes) -> None:
        os.pwrite(self._file, content, _SIZE * at)


class Remainder:
    """What is left of the shards that are being written, handed out from their ends."""

    def __init__(
        self,
        under_way: Callable[[], list[tuple[int, int]]],
        num_samples: Callable[[int], int],
        samples: Callable[[int, int, int], Listing],
    ) -> None:
        """Has handed out nothing yet.

        Args:
            under_way: returns the tasks that are at a sample, and at which.
            num_samples: returns how many a task has.
            samples: returns those of a task from one to before another.
        """
        self._under_way = under_way
        self._num_samples = num_samples
        self._samples = samples
        self._ends: dict[int, int] = {}
        """Of each task, where the samples end that are left."""

    def take(self) -> Piece | None:
        """Returns the last images of the shard of which most are left; None where that isn't worth while."""
        left = {task: self._ends.get(task, self._num_samples(task)) - at - 1 for task, at in self._under_way()}
        task = max(left, key=lambda task: left[task], default=-1)
        if task < 0 or left[task] < 2 * _MIN_IMAGES:
            return None
        end = self._ends.get(task, self._num_samples(task))
        first = self._ends[task] = end - max(_MIN_IMAGES, left[task] // _FRACTION)
        return Piece(task=task, first=first, samples=self._samples(task, first, end))
