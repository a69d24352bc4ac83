"""Which fields of a ``.beton`` are image and label, and what its labels are."""

import itertools
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestri.shards.beton_format import ARRAY_TYPES, IMAGE_TYPE, Beton, Field, read_exactly
from maestri.shards.errors import ShardError
from maestri.shards.sources.labels import MAX_CLASSES

_NAMES = ("label", "labels")


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """Labels of all samples."""

    first: NDArray[np.int32]
    """The first or only one; −1 for none; ``sample``."""
    num_classes: int
    """One more than the largest, or the length of the arrays."""
    ends: NDArray[np.int64] | None = None
    """Where each sample's labels end in ``values``; None where no sample has more than one."""
    values: NDArray[np.int32] | None = None
    """All labels back to back."""


def image_field(beton: Beton, name: str | None) -> Field:
    """Returns the field that holds the images: the only one of that type, or the one called ``name``.

    Raises:
        ShardError: it is missing or of another type, or several may be meant.
    """
    if name is not None:
        return beton.field(name, IMAGE_TYPE)
    found = beton.fields_of(IMAGE_TYPE)
    if len(found) == 1:
        return found[0]
    problem = "say which field is the image (--image NAME)" if found else f"no field is an {IMAGE_TYPE}"
    raise ShardError(f"{beton.path}: {problem}; its fields are {beton.list_fields()}")


def label_field(beton: Beton, name: str | None) -> Field | None:
    """Returns the field that holds the labels, None where there is none.

    Args:
        beton: the file.
        name: the field's; empty for none.  By default the one called ``label`` or ``labels``, else the only integer.

    Raises:
        ShardError: the field is missing or of another type, or several may be meant.
    """
    if name is not None:
        return beton.field(name, "IntField", *ARRAY_TYPES) if name else None
    for field in beton.fields_of("IntField", *ARRAY_TYPES):
        if field.name in _NAMES:
            return field
    integers = beton.fields_of("IntField")
    if len(integers) > 1:
        raise ShardError(
            f"{beton.path}: say which field is the label (--label NAME); its fields are {beton.list_fields()}"
        )
    return integers[0] if integers else None


def read_labels(beton: Beton, field: Field | None) -> Labels:
    """Returns a field's labels.

    An integer is a class number, and so is an array of one integer; a longer array holds 1 for each class of the image
    and 0 elsewhere.

    Raises:
        ShardError: a row holds neither.
    """
    if field is None:
        return Labels(first=np.full(beton.num_samples, -1, np.int32), num_classes=0)
    if field.kind == "IntField":
        return _numbers(beton, field, beton.integers(field))
    offsets, dtype, shape = beton.arrays(field)
    if math.prod(shape) == 1 and dtype.kind in "iu":
        with beton.path.open("rb") as file:
            parts = [read_exactly(beton.path, file.fileno(), dtype.itemsize, at) for at in offsets.tolist()]
        return _numbers(beton, field, np.frombuffer(b"".join(parts), dtype))
    return _marked(beton, field, offsets, dtype, math.prod(shape))


def _numbers(beton: Beton, field: Field, values: NDArray[Any]) -> Labels:
    good = (values >= -1) & (values < MAX_CLASSES)
    if not good.all():
        row = int(np.argmin(good))
        raise ShardError(
            f"{beton.path}: row {row}, field '{field.name}' is {values[row]}; expected a class below {MAX_CLASSES}"
        )
    return Labels(first=values.astype(np.int32), num_classes=int(values.max(initial=-1)) + 1)


def _marked(beton: Beton, field: Field, offsets: NDArray[np.int64], dtype: np.dtype[Any], num_classes: int) -> Labels:
    """Reads arrays with a place for each class."""
    if num_classes > MAX_CLASSES:
        raise ShardError(f"{beton.path}: field '{field.name}' has {num_classes} places; expected up to {MAX_CLASSES}")
    found: list[NDArray[np.intp]] = []
    file = os.open(beton.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for row, offset in enumerate(offsets.tolist()):
            marks = np.frombuffer(read_exactly(beton.path, file, dtype.itemsize * num_classes, offset), dtype)
            labels = np.flatnonzero(marks)
            if np.any(marks[labels] != 1):
                raise ShardError(f"{beton.path}: row {row}, field '{field.name}' holds other values than 0 and 1")
            found.append(labels)
    finally:
        os.close(file)
    first = np.array([labels[0] if len(labels) else -1 for labels in found], np.int32)
    if all(len(labels) <= 1 for labels in found):
        return Labels(first=first, num_classes=num_classes)
    ends = np.array(list(itertools.accumulate(len(labels) for labels in found)), np.int64)
    return Labels(first=first, num_classes=num_classes, ends=ends, values=np.concatenate(found).astype(np.int32))
