"""FFCV's file format, version 2 (``.beton``): where everything lies.  Nothing that the file says is taken on trust."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestri.shards.errors import ShardError

VERSION = 2
MIN_PAGE, MAX_PAGE = 1 << 21, 1 << 31
"""Bytes; what FFCV's writer takes.  Pages are powers of two and lie at multiples of their size."""
MAX_FIELDS = 1024
MAX_SAMPLES = 1 << 31
MAX_SIDE = 65535
"""Pixels."""
JPEG, RAW = 0, 1
"""Values of an image's ``mode``."""

HEADER = np.dtype([
    ("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_table_ptr", "<u8"),
])  # fmt: skip
FIELD = np.dtype([("type_id", "u1"), ("name", "V16"), ("arguments", "V1024")])
REGION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
"""A row of the allocation table, which reaches to the end of the file."""
IMAGE_ROW = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ARRAY_ARGUMENTS = np.dtype([("shape", "<u8", 32), ("type_length", "<u8")])
"""The first of an array field's arguments; its numpy type in JSON stands behind them."""
_BYTES_ROW = np.dtype([("ptr", "<u8"), ("size", "<u8")])

FIELD_TYPES: dict[int, tuple[str, np.dtype[Any]]] = {
    0: ("FloatField", np.dtype("<f8")),
    1: ("IntField", np.dtype("<i8")),
    2: ("RGBImageField", IMAGE_ROW),
    3: ("BytesField", _BYTES_ROW),
    4: ("NDArrayField", np.dtype("<u8")),
    5: ("JSONField", _BYTES_ROW),
    6: ("TorchTensorField", np.dtype("<u8")),
}
"""By type number: FFCV's name, and what the metadata table holds of it per sample."""
CUSTOM_TYPE = 255
IMAGE_TYPE = "RGBImageField"
ARRAY_TYPES = ("NDArrayField", "TorchTensorField")
_ELEMENT = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """A field of each sample."""

    name: str
    """At most 16 characters."""
    kind: str
    """FFCV's name of its type."""
    column: str
    """Of the metadata table."""
    arguments: bytes
    """1,024 bytes whose meaning depends on the type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """Where an image field's images lie; all ``sample``."""

    offsets: NDArray[np.int64]
    """First byte in the file."""
    sizes: NDArray[np.int64]
    """Bytes."""
    widths: NDArray[np.int64]
    """Pixels."""
    heights: NDArray[np.int64]
    """Pixels."""
    is_raw: NDArray[np.bool_]
    """Pixels ``height width 3`` rather than a JPEG."""


def metadata_type(columns: Sequence[np.dtype[Any]]) -> np.dtype[Any]:
    """Returns the type of a row of the metadata table: fields in order, aligned as a C compiler would."""
    return np.dtype([(f"f{at}", column) for at, column in enumerate(columns)], align=True)


def is_beton(path: Path) -> bool:
    """Returns whether a file is called ``.beton`` or starts as one.

    Raises:
        OSError: it cannot be read.
    """
    if path.suffix == ".beton":
        return True
    with path.open("rb") as file:
        head = file.read(HEADER.itemsize)
    if len(head) < HEADER.itemsize:
        return False
    header = np.frombuffer(head, HEADER)[0]
    has_fields = 0 < header["num_fields"] <= MAX_FIELDS
    return bool(header["version"] == VERSION and has_fields and _is_page(int(header["page_size"])))


class Beton:
    """The tables of a ``.beton``, checked; its images are read by who asks where they lie."""

    def __init__(self, path: Path) -> None:
        """Reads the tables.

        Raises:
            ShardError: it is no such file, damaged, cut short, or has a field of a custom type.
            OSError: it cannot be read.
        """
        self.path = path
        with path.open("rb") as file:
            self.file_bytes = os.fstat(file.fileno()).st_size
            self._read(file.fileno())

    def _read(self, file: int) -> None:
        header = self._table(file, HEADER, 0, 1, "header")[0]
        if header["version"] != VERSION:
            raise ShardError(f"{self.path} is no FFCV file of version {VERSION}: it starts with {header['version']}")
        self.page_size, self.num_samples = int(header["page_size"]), int(header["num_samples"])
        self.alloc_table_ptr, num_fields = int(header["alloc_table_ptr"]), int(header["num_fields"])
        if not _is_page(self.page_size):
            raise ShardError(f"{self.path}: pages of {self.page_size} bytes; expected a power of two ≥ {MIN_PAGE}")
        if not 0 < num_fields <= MAX_FIELDS or self.num_samples > MAX_SAMPLES:
            raise ShardError(f"{self.path}: {num_fields} fields and {self.num_samples} samples are no sane numbers")
        described = self._table(file, FIELD, HEADER.itemsize, num_fields, "descriptions of fields")
        self.fields = tuple(self._field(entry, at) for at, entry in enumerate(described))
        by_kind = dict(FIELD_TYPES.values())
        start = HEADER.itemsize + described.nbytes
        row_type = metadata_type([by_kind[field.kind] for field in self.fields])
        self.metadata = self._table(file, row_type, start, self.num_samples, "metadata table")
        self.tables_end = start + self.metadata.nbytes
        if not self.tables_end <= self.alloc_table_ptr <= self.file_bytes:
            raise ShardError(
                f"{self.path}: its header puts the allocation table at byte {self.alloc_table_ptr}; "
                f"expected {self.tables_end} to {self.file_bytes}"
            )
        count, rest = divmod(self.file_bytes - self.alloc_table_ptr, REGION.itemsize)
        if rest:
            raise ShardError(f"{self.path} is cut short: its allocation table ends {rest} bytes into an entry")
        self._check_regions(self._table(file, REGION, self.alloc_table_ptr, count, "allocation table"))

    def _table(self, file: int, dtype: np.dtype[Any], start: int, count: int, what: str) -> NDArray[Any]:
        """Returns a table, after a look at whether the file is long enough for it."""
        size = dtype.itemsize * count
        if start + size > self.file_bytes:
            raise ShardError(
                f"{self.path} is cut short: its {what} ends at byte {start + size} and the file at {self.file_bytes}"
            )
        return np.frombuffer(read_exactly(self.path, file, size, start), dtype)

    def _field(self, entry: np.void, at: int) -> Field:
        raw = entry["name"].tobytes().split(b"\0")[0]
        name = raw.decode("ascii", "backslashreplace")
        type_id = int(entry["type_id"])
        if type_id == CUSTOM_TYPE:
            raise ShardError(
                f"{self.path}: field '{name}' is of a custom type, whose size only its own program knows; "
                "write the file again without it"
            )
        if type_id not in FIELD_TYPES or not raw.isascii():
            raise ShardError(f"{self.path}: field {at}, '{name}', is of type {type_id}; FFCV knows 0 to 6")
        return Field(name=name, kind=FIELD_TYPES[type_id][0], column=f"f{at}", arguments=entry["arguments"].tobytes())

    def _check_regions(self, regions: NDArray[Any]) -> None:
        """Checks the allocation table and keeps it by position."""
        regions = regions[regions["size"] > 0]  # an empty text has an entry at the position of whatever comes next
        starts, sizes = regions["ptr"], regions["size"]
        ends = starts + sizes  # may wrap, but not where both are within the file
        limit = np.uint64(self.alloc_table_ptr)
        inside = (starts >= self.tables_end) & (starts < limit) & (sizes <= limit) & (ends <= limit)
        page = np.uint64(self.page_size)
        self._check_entries(regions, inside, f"lies outside of bytes {self.tables_end} to {limit}")
        self._check_entries(regions, starts // page == (ends - np.uint64(1)) // page, f"crosses a page of {page} bytes")
        self._regions = regions[np.argsort(starts, kind="stable")]
        overlaps = np.flatnonzero(self._regions["ptr"][1:] < self._regions["ptr"][:-1] + self._regions["size"][:-1])
        if len(overlaps):
            one, two = self._regions[overlaps[0] : overlaps[0] + 2]
            raise ShardError(
                f"{self.path}: regions of rows {one['sample_id']} and {two['sample_id']} overlap at byte {two['ptr']}"
            )

    def _check_entries(self, regions: NDArray[Any], good: NDArray[np.bool_], problem: str) -> None:
        if not good.all():
            bad = regions[np.argmin(good)]
            raise ShardError(
                f"{self.path}: the region of row {bad['sample_id']} ({bad['size']} bytes at {bad['ptr']}) {problem}"
            )

    def fields_of(self, *kinds: str) -> tuple[Field, ...]:
        """Returns the fields of some types."""
        return tuple(field for field in self.fields if field.kind in kinds)

    def field(self, name: str, *kinds: str) -> Field:
        """Returns a field by name.

        Raises:
            ShardError: there is none, more than one, or it is of another type.
        """
        found = [field for field in self.fields if field.name == name]
        if len(found) != 1:
            raise ShardError(
                f"{self.path} has {len(found) or 'no'} fields '{name}'; its fields are {self.list_fields()}"
            )
        if found[0].kind not in kinds:
            raise ShardError(
                f"{self.path}: field '{name}' is a {found[0].kind}, not a {' or '.join(kinds)}; "
                f"its fields are {self.list_fields()}"
            )
        return found[0]

    def list_fields(self) -> str:
        """Returns names and types of all fields for an error."""
        return ", ".join(f"'{field.name}' ({field.kind})" for field in self.fields)

    def images(self, field: Field) -> Images:
        """Returns where the images of an image field lie.

        Raises:
            ShardError: a row is damaged.
        """
        rows = self.metadata[field.column]
        self._check_rows(field, rows["mode"] <= RAW, rows["mode"], "is of mode")
        self._check_rows(
            field, (rows["width"] > 0) & (rows["height"] > 0), rows["width"], "has no pixels; its width is"
        )
        offsets, sizes = self._pointed_at(field, rows["data_ptr"])
        widths, heights = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
        is_raw: NDArray[np.bool_] = rows["mode"] == RAW
        self._check_rows(
            field, ~is_raw | (sizes == 3 * widths * heights), sizes, "is raw and has a wrong size in bytes:"
        )
        return Images(offsets=offsets, sizes=sizes, widths=widths, heights=heights, is_raw=is_raw)

    def arrays(self, field: Field) -> tuple[NDArray[np.int64], np.dtype[Any], tuple[int, ...]]:
        """Returns where the arrays of an array field lie, their type and their shape.

        Raises:
            ShardError: a row or the field's description is damaged.
        """
        dtype, shape = self._array_type(field)
        offsets, sizes = self._pointed_at(field, self.metadata[field.column])
        self._check_rows(field, sizes == dtype.itemsize * math.prod(shape), sizes, "has a wrong size in bytes:")
        return offsets, dtype, shape

    def integers(self, field: Field) -> NDArray[np.int64]:
        """Returns the values of an integer field."""
        return self.metadata[field.column].astype(np.int64)

    def _array_type(self, field: Field) -> tuple[np.dtype[Any], tuple[int, ...]]:
        head = np.frombuffer(field.arguments, ARRAY_ARGUMENTS, 1)[0]
        start, length = ARRAY_ARGUMENTS.itemsize, int(head["type_length"])
        shape = tuple(int(side) for side in np.trim_zeros(head["shape"], "b"))
        try:
            ((_, text),) = json.loads(field.arguments[start : start + length])
        except (ValueError, TypeError, RecursionError):
            text = None
        elements = math.prod(shape)
        if not isinstance(text, str) or not _ELEMENT.fullmatch(text) or not shape or not 0 < elements < MAX_PAGE:
            raise ShardError(f"{self.path}: field '{field.name}' is an array of no readable type and shape {shape}")
        return np.dtype(text), shape

    def _pointed_at(self, field: Field, pointers: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns start and size of the regions that a column of pointers names."""
        if not len(self._regions):
            self._check_rows(field, np.zeros(len(pointers), np.bool_), pointers, "has a pointer and no region:")
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        at = np.minimum(np.searchsorted(self._regions["ptr"], pointers), len(self._regions) - 1)
        found = self._regions[at]
        is_own = (found["ptr"] == pointers) & (found["sample_id"] == np.arange(len(pointers), dtype=np.uint64))
        self._check_rows(field, is_own, pointers, "has a pointer that the allocation table does not give it:")
        return found["ptr"].astype(np.int64), found["size"].astype(np.int64)

    def _check_rows(self, field: Field, good: NDArray[np.bool_], values: NDArray[Any], problem: str) -> None:
        if not good.all():
            row = int(np.argmin(good))
            raise ShardError(f"{self.path}: row {row}, field '{field.name}' {problem} {values[row]}")


def _is_page(size: int) -> bool:
    return MIN_PAGE <= size <= MAX_PAGE and int(size).bit_count() == 1


def read_exactly(path: Path, file: int, size: int, offset: int) -> bytes:
    """Returns bytes of an open file.

    Raises:
        ShardError: it ends before.
    """
    data = os.pread(file, size, offset)
    if len(data) < size:  # a read takes at most 2 GiB
        parts = [data]
        missing = size - len(data)
        while missing and parts[-1]:
            parts.append(os.pread(file, missing, offset + size - missing))
            missing -= len(parts[-1])
        if missing:
            raise ShardError(f"{path} is cut short: it ends {missing} bytes before byte {offset + size}")
        data = b"".join(parts)
    return data
