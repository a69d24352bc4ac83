"""Labels as sources have them, numbers or names, one an image or several, made into a listing's columns."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maestri.shards.errors import ShardError

MAX_CLASSES = 1 << 22
"""A larger class number is taken for something else, such as an id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelColumns:
    """A listing's columns about labels."""

    labels: NDArray[np.int32]
    label_ends: NDArray[np.int64] | None
    label_values: NDArray[np.int32] | None
    class_names: tuple[str, ...]


class Labels:
    """Gathers labels image by image.

    Numbers make the classes ``0`` … up to the largest one, names the sorted names, unless the names of all classes are
    given: then numbers are positions in them, and every name must be one of them.
    """

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        """Takes the names of all classes where they are known."""
        self._given = tuple(class_names)
        self._numbers = {name: number for number, name in enumerate(self._given)}
        self._values = array("i")
        self._ends = array("q")
        self._are_several = False
        self._first: dict[bool, str] = {}
        if len(self._numbers) != len(self._given):
            twice = next(name for name in self._given if self._given.count(name) > 1)
            raise ShardError(f"class {twice[:200]!a} is named twice")

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, value: object, where: str) -> None:
        """Takes the labels of the next image.

        Args:
            value: a number, a name, a list of either, or None; −1 is none too.
            where: the image, for the text of an error.

        Raises:
            ShardError: it is something else, out of range, unknown, or a name among numbers.
        """
        if isinstance(value, list | tuple):
            self._are_several = True
            for one in value:
                self._add_one(one, where)
        else:
            self._add_one(value, where)
        self._ends.append(len(self._values))

    def columns(self) -> LabelColumns:
        """Returns what was gathered."""
        values = np.array(self._values, np.int32)
        ends = np.array(self._ends, np.int64)
        names = self._given
        if not names and False in self._first:
            names = tuple(str(number) for number in range(int(values.max()) + 1))
        elif not names and self._numbers:
            names = tuple(sorted(self._numbers))
            position = {name: number for number, name in enumerate(names)}
            values = np.array([position[name] for name in self._numbers], np.int32)[values]
        starts = np.concatenate((np.zeros(1, np.int64), ends[:-1])) if len(ends) else ends
        has_label = starts < ends
        labels = np.full(len(ends), -1, np.int32)
        labels[has_label] = values[starts[has_label]]
        return LabelColumns(
            labels=labels,
            label_ends=ends if self._are_several else None,
            label_values=values if self._are_several else None,
            class_names=names,
        )

    def _add_one(self, value: object, where: str) -> None:
        if value is None or (type(value) is int and value == -1):
            return
        is_name = isinstance(value, str)
        if not is_name and type(value) is not int:
            raise ShardError(f"{where}: a label is a number or a name, not {_shown(value)}")
        self._first.setdefault(is_name, f"{_shown(value)} in {where}")
        if len(self._first) > 1:
            raise ShardError(f"some labels are numbers, some are names: {self._first[False]}, {self._first[True]}")
        number = self._number_of(value, where) if isinstance(value, str) else value
        assert isinstance(number, int)
        limit = len(self._given) or MAX_CLASSES
        if not 0 <= number < limit:
            raise ShardError(f"{where}: label {_shown(number)} is out of range; class numbers are 0 to {limit - 1}")
        self._values.append(number)

    def _number_of(self, name: str, where: str) -> int:
        number = self._numbers.get(name)
        if number is None:
            if self._given:
                raise ShardError(f"{where}: {_shown(name)} is none of the {len(self._given)} classes")
            if "\0" in name or not name or not _is_storable(name):
                raise ShardError(f"{where}: {_shown(name)} cannot be the name of a class")
            number = self._numbers[name] = len(self._numbers)
        return number


def _is_storable(name: str) -> bool:
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    if type(value) is int and value.bit_length() > 256:
        return "a number of many digits"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
