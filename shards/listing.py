"""What a source holds, in columns: a million images cost about a hundred bytes each."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from maestri.shards.errors import ShardError

_Number = TypeVar("_Number", bound=np.generic)


class Strings:
    """Many strings in two arrays; surrogates stand for bytes that are not UTF-8, as in file names."""

    __slots__ = ("data", "ends")

    def __init__(self, data: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        """Takes all strings in UTF-8 back to back, and where each ends."""
        self.data = data
        self.ends = ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Strings":
        """Returns the texts in columns."""
        draft = StringsDraft()
        for text in texts:
            draft.add(text)
        return draft.strings()

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, at: int) -> str:
        start = int(self.ends[at - 1]) if at else 0
        return self.data[start : int(self.ends[at])].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self.ends.tolist():
            yield self.data[start:end].tobytes().decode("utf-8", "surrogateescape")
            start = end

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Strings):
            return NotImplemented
        return np.array_equal(self.ends, other.ends) and np.array_equal(self.data, other.data)

    __hash__ = None  # type: ignore[assignment]  # holds arrays

    def take(self, rows: NDArray[np.int64]) -> "Strings":
        """Returns some of them, in the order given."""
        starts = np.where(rows > 0, self.ends[rows - 1], 0)
        return Strings(*_ragged(self.data, starts, self.ends[rows]))


class StringsDraft:
    """Strings in the making: as few bytes as they will have."""

    def __init__(self) -> None:
        """Empty."""
        self._data = bytearray()
        self._ends = array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, text: str) -> None:
        """Takes the next string."""
        self._data += text.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._data))

    def strings(self) -> Strings:
        """Returns them; nothing can be added any more."""
        data, ends = np.frombuffer(self._data, np.uint8), np.frombuffer(self._ends, np.int64)
        data.flags.writeable = ends.flags.writeable = False
        return Strings(data, ends)


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """Everything about a source but the images themselves, in its own order."""

    keys: Strings
    """Unique; ``/`` separates folders, dots and blanks are escaped."""
    names: Strings
    """What a user calls each image: its path in the source, or its number there."""
    places: NDArray[np.int64]
    """What the source needs to find an image again, such as file, offset and size; ``sample 3``."""
    sizes: NDArray[np.int64]
    """Bytes of each image in the source; ``sample``."""
    labels: NDArray[np.int32]
    """Positions in ``class_names``; −1 for none; the first where there are several; ``sample``."""
    label_ends: NDArray[np.int64] | None = None
    """Where an image may have several labels: where its own end in ``label_values``; ``sample``."""
    label_values: NDArray[np.int32] | None = None
    """All labels of all images, back to back."""
    class_names: tuple[str, ...]
    """Empty without labels."""
    content: str = ""
    """SHA-256 of the images themselves, where the source is read whole anyway."""

    def __len__(self) -> int:
        return len(self.sizes)

    def digest(self) -> str:
        """Returns a SHA-256 over all of it but ``names`` and ``places``: where an image lies changes nothing."""
        state = hashlib.sha256()
        for part in (self.keys.data, self.keys.ends, self.sizes, self.labels, self.label_ends, self.label_values):
            values = np.zeros(0, np.uint8) if part is None else part
            state.update(f"{len(values)};".encode())
            state.update(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes())
        state.update("\0".join(self.class_names).encode("utf-8", "surrogateescape") + b"\0")
        state.update(self.content.encode())
        return state.hexdigest()

    def with_classes(self, class_names: tuple[str, ...]) -> "Listing":
        """Returns the same with classes numbered by another list of names.

        Raises:
            ShardError: an image's class is not in it.
        """
        number = {name: at for at, name in enumerate(class_names)}
        values = self.labels if self.label_values is None else np.concatenate([self.labels, self.label_values])
        used = np.unique(values[values >= 0]).tolist()
        lacking = [self.class_names[at] for at in used if self.class_names[at] not in number]
        if lacking:
            raise ShardError(f"class '{lacking[0]}' is not among the {len(class_names)} classes given")
        table = np.array([*(number.get(name, -1) for name in self.class_names), -1], np.int32)  # -1 finds the last
        several = None if self.label_values is None else table[self.label_values]
        return replace(self, labels=table[self.labels], label_values=several, class_names=class_names)

    def take(self, samples: NDArray[np.int64]) -> "Listing":
        """Returns some of its samples, in the order given; small enough to send to a worker."""
        ends, values = self.label_ends, self.label_values
        if ends is not None and values is not None:
            starts = np.where(samples > 0, ends[samples - 1], 0)
            values, ends = _ragged(values, starts, ends[samples])
        return Listing(
            keys=self.keys.take(samples),
            names=self.names.take(samples),
            places=self.places[samples],
            sizes=self.sizes[samples],
            labels=self.labels[samples],
            label_ends=ends,
            label_values=values,
            class_names=self.class_names,
        )

    def labels_of(self, sample: int) -> tuple[int, ...] | None:
        """Returns all labels of a sample where it may have several, None elsewhere."""
        if self.label_ends is None or self.label_values is None:
            return None
        start = int(self.label_ends[sample - 1]) if sample else 0
        return tuple(self.label_values[start : int(self.label_ends[sample])].tolist())


def _ragged(
    values: NDArray[_Number], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[_Number], NDArray[np.int64]]:
    """Returns the pieces of an array back to back, and where each ends."""
    sizes = ends - starts
    stops = np.cumsum(sizes)
    at = np.arange(int(stops[-1]) if len(stops) else 0) + np.repeat(starts - (stops - sizes), sizes)
    return values[at], stops
