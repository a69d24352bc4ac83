"""One shard as a ``.beton``: FFCV's file with the images as they are, without FFCV."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from maestri.shards import beton_block
from maestri.shards.beton_format import (
    ARRAY_ARGUMENTS,
    FIELD,
    HEADER,
    IMAGE_ROW,
    JPEG,
    MAX_PAGE,
    MAX_SIDE,
    REGION,
    VERSION,
    metadata_type,
)
from maestri.shards.errors import ShardError
from maestri.shards.rows import Rows, Sample

PAGE_BYTES = 1 << 23
"""FFCV's own default; a larger image makes it larger."""
HEAD_BYTES = 1 << 18
"""Where the first image lies, unless the tables before it need more."""
IMAGE, LABEL = "image", "label"
"""Names of the fields, FFCV's customary ones."""
FIXED_BYTES = HEADER.itemsize + 2 * FIELD.itemsize
"""Header and description of the fields; the metadata table follows."""
ROW_BYTES = 24
"""Of the metadata table; the same for both kinds of labels."""
_CHUNK = 1 << 22


class BetonShard:
    """A ``.beton`` in the making; nothing is synced.

    Images go straight to the file, in the order given; tables are written at the end.  Bytes depend on the samples and
    class names alone.  Until it is closed without an error, the file has no valid header.
    """

    def __init__(self, path: Path, *, num_classes: int = 0, class_names: Sequence[str] = ()) -> None:
        """Makes the file.

        Args:
            path: of the file.
            num_classes: where images may have several labels: how many classes there are.  Then the label is an array
                of so many bytes, 1 for each class of the image, elsewhere an integer, −1 for none.
            class_names: kept in the file.
        """
        self.rows = Rows()
        self.xxh128 = ""
        self._path, self._num_classes, self._class_names = path, num_classes, class_names
        self._page_size = PAGE_BYTES
        self._end = HEAD_BYTES
        self._file = path.open("w+b", buffering=1 << 20)
        self._file.seek(self._end)

    def __enter__(self) -> "BetonShard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._file.close()

    def add(self, sample: Sample) -> None:
        """Writes a sample.

        Raises:
            ShardError: FFCV's format cannot hold it.
        """
        image = sample.image
        if image.extension != "jpg":
            raise ShardError(f"{sample.key}: a .beton holds JPEG, not {image.extension}; write tar shards instead")
        if max(image.width, image.height) > MAX_SIDE:
            raise ShardError(
                f"{sample.key}: {image.width} × {image.height} pixels; a .beton holds up to {MAX_SIDE} a side"
            )
        labels = self._labels(sample)
        marks = marks_of(labels, self._num_classes)
        size = len(image.data) + len(marks)
        while size > self._page_size:
            self._page_size *= 2
        if self._page_size > MAX_PAGE:
            raise ShardError(f"{sample.key}: {size} bytes; a sample in a .beton has up to {MAX_PAGE}")
        if self._end // self._page_size != (self._end + size - 1) // self._page_size:
            self._end += -self._end % self._page_size
            self._file.seek(self._end)
        self.rows.add(replace(sample, labels=labels) if self._num_classes else sample, offset=self._end)
        self._file.write(image.data)
        self._file.write(marks)
        self._end += size

    def _labels(self, sample: Sample) -> tuple[int, ...]:
        """Returns what the array of classes is made of; nothing where the label is an integer."""
        if not self._num_classes:
            if sample.labels is not None:
                raise ShardError(f"{sample.key} may have several labels; the number of classes is not given")
            return ()
        labels = sample.labels if sample.labels is not None else (sample.label,)[: sample.label + 1]
        if any(not 0 <= label < self._num_classes for label in labels):
            raise ShardError(f"{sample.key}: a label of {labels} is none of {self._num_classes} classes")
        return labels

    def _finish(self) -> None:
        """Writes what is not an image."""
        self._file.flush()
        file = self._file.fileno()
        tables_end = FIXED_BYTES + len(self.rows.keys) * ROW_BYTES
        if tables_end > HEAD_BYTES:
            self._move(file, -(-(tables_end - HEAD_BYTES) // self._page_size) * self._page_size)
        start = self._end + -self._end % beton_block.ALIGNMENT
        columns = self.rows.columns()
        num_classes, page_size = self._num_classes, self._page_size
        block = beton_block.encode(
            columns, class_names=self._class_names, num_classes=num_classes, page_size=page_size, start=start
        )
        head, regions = tables(columns, num_classes=num_classes, page_size=page_size, end=start + len(block))
        self._file.seek(start)
        self._file.write(block + regions)
        self._file.seek(0)
        self._file.write(head)
        self._file.flush()
        self.xxh128 = _xxh128(file)

    def _move(self, file: int, distance: int) -> None:
        """Moves all images back by whole pages, to make room for tables of many rows."""
        for stop in range(self._end, HEAD_BYTES, -_CHUNK):
            start = max(stop - _CHUNK, HEAD_BYTES)
            _write_all(file, os.pread(file, stop - start, start), start + distance)
        for start in range(HEAD_BYTES, HEAD_BYTES + distance, _CHUNK):
            _write_all(file, bytes(min(_CHUNK, HEAD_BYTES + distance - start)), start)
        self._end += distance
        self.rows.numbers = [(offset + distance, *rest) for offset, *rest in self.rows.numbers]


def marks_of(labels: Sequence[int], num_classes: int) -> bytes:
    """Returns a byte for each class: 1 where the image is of it."""
    marks = bytearray(num_classes)
    for label in labels:
        marks[label] = 1
    return bytes(marks)


def tables(columns: Mapping[str, NDArray[Any]], *, num_classes: int, page_size: int, end: int) -> tuple[bytes, bytes]:
    """Returns the file's start (header, fields, metadata) and its end (the allocation table).

    Args:
        columns: the rows of the index.
        num_classes: length of the label arrays, 0 where labels are integers.
        page_size: bytes.
        end: where the allocation table starts.
    """
    num_rows = len(columns["offset"])
    header = np.array([(VERSION, 2, page_size, num_rows, end)], HEADER)
    metadata = np.zeros(num_rows, _row_type(num_classes))
    metadata["f0"]["mode"] = JPEG
    metadata["f0"]["width"], metadata["f0"]["height"] = columns["width"], columns["height"]
    metadata["f0"]["data_ptr"] = columns["offset"]
    behind = columns["offset"] + columns["bytes"]
    metadata["f1"] = behind if num_classes else columns["label"]
    regions = np.zeros((num_rows, 2 if num_classes else 1), REGION)
    regions["sample_id"] = np.arange(num_rows)[:, None]
    regions["ptr"][:, 0], regions["size"][:, 0] = columns["offset"], columns["bytes"]
    if num_classes:
        regions["ptr"][:, 1], regions["size"][:, 1] = behind, num_classes
    return header.tobytes() + _fields(num_classes) + metadata.tobytes(), regions.tobytes()


def _fields(num_classes: int) -> bytes:
    arguments = b""
    if num_classes:
        element = json.dumps(np.dtype(np.uint8).descr).encode()
        arguments = np.array([([num_classes] + [0] * 31, len(element))], ARRAY_ARGUMENTS).tobytes() + element
    label_type = 4 if num_classes else 1
    entries = [(2, IMAGE.encode(), b""), (label_type, LABEL.encode(), arguments)]
    return np.array(entries, FIELD).tobytes()


def _row_type(num_classes: int) -> np.dtype[Any]:
    return metadata_type([IMAGE_ROW, np.dtype("<u8" if num_classes else "<i8")])


def _write_all(file: int, data: bytes, offset: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(file, data[written:], offset + written)


def _xxh128(file: int) -> str:
    state, at = xxhash.xxh3_128(), 0
    while chunk := os.pread(file, _CHUNK, at):
        state.update(chunk)
        at += len(chunk)
    return state.hexdigest()
