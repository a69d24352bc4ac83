"""``index.bin``: a row per sample, stored by column and memory-mapped.

The file is a 64-byte head (magic ``MSTRIDX1``, number of rows as little-endian uint64, zeros) and then the columns,
each starting at a multiple of 64 bytes, little-endian.  Where each starts is in the manifest.  Opening it reads
nothing but the head.
"""

import operator
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestri.shards.errors import ShardError

FILE_NAME = "index.bin"
MAGIC = b"MSTRIDX1"
ALIGNMENT = 64

COLUMNS: dict[str, str] = {
    "shard": "<u4",
    "offset": "<u8",
    "bytes": "<u4",
    "width": "<u4",
    "height": "<u4",
    "orientation": "u1",
    "stored": "u1",
    "label": "<i4",
    "crc32": "<u4",
    "key_end": "<u8",
}
"""One value per row; behind them stand ``keys`` (bytes) and, where labels are several, their two columns."""
_DTYPES = {**COLUMNS, "keys": "u1", "label_end": "<u8", "label_values": "<i4"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Read-only columns over the memory-mapped index; all ``sample`` but ``keys``."""

    shard: NDArray[np.uint32]
    """Position of the shard in the manifest."""
    offset: NDArray[np.uint64]
    """First byte of the image in the shard."""
    bytes: NDArray[np.uint32]
    """Size of the stored image."""
    width: NDArray[np.uint32]
    """Pixels, as stored: EXIF orientation is not applied."""
    height: NDArray[np.uint32]
    """Pixels, as stored."""
    orientation: NDArray[np.uint8]
    """EXIF orientation, 1–8; 1 where there is none."""
    stored: NDArray[np.uint8]
    """What was stored, as ``images`` numbers it: 0 for the source's bytes."""
    label: NDArray[np.int32]
    """Position in the manifest's class names; −1 for none; the first where there are several."""
    crc32: NDArray[np.uint32]
    """CRC-32 of the stored image."""
    key_end: NDArray[np.uint64]
    """Where the row's key ends in ``keys``; it starts where the row before ends."""
    keys: NDArray[np.uint8]
    """All keys, UTF-8, back to back; ``byte``."""
    label_end: NDArray[np.uint64] | None = None
    """Where an image may have several labels: where the row's end in ``label_values``."""
    label_values: NDArray[np.int32] | None = None
    """All labels of all images, back to back."""


def layout_of(num_rows: int, *, key_bytes: int, num_labels: int | None = None) -> dict[str, dict[str, Any]]:
    """Returns where each column lies: dtype, first byte, and number of values.

    Args:
        num_rows: rows of the index.
        key_bytes: bytes of all keys.
        num_labels: labels of all images, where an image may have several.
    """
    lengths: dict[str, tuple[str, int]] = {name: (dtype, num_rows) for name, dtype in COLUMNS.items()}
    lengths["keys"] = ("|u1", key_bytes)
    if num_labels is not None:
        lengths |= {"label_end": ("<u8", num_rows), "label_values": ("<i4", num_labels)}
    layout: dict[str, dict[str, Any]] = {}
    at = ALIGNMENT
    for name, (dtype, length) in lengths.items():
        layout[name] = {"dtype": np.dtype(dtype).str, "offset": at, "length": length}
        at += -(-np.dtype(dtype).itemsize * length // ALIGNMENT) * ALIGNMENT
    return layout


class IndexDraft:
    """An index in the making: filled shard by shard, so that memory does not grow with it."""

    def __init__(self, path: Path, num_rows: int, layout: Mapping[str, Mapping[str, Any]]) -> None:
        """Makes ``path`` at its full size."""
        self._layout = layout
        self._done = dict.fromkeys(layout, 0)
        self._sums = {"key_end": 0, "label_end": 0}
        self._file = path.open("wb", buffering=0)
        self._file.write(struct.pack("<8sQ", MAGIC, num_rows).ljust(ALIGNMENT, b"\0"))
        last = max(layout.values(), key=lambda column: int(column["offset"]))
        end = last["offset"] + np.dtype(last["dtype"]).itemsize * last["length"]
        self._file.truncate(-(-end // ALIGNMENT) * ALIGNMENT)

    def add(self, columns: Mapping[str, NDArray[Any]]) -> None:
        """Writes the next rows, as ``Rows.columns`` gives them, with ``shard`` added.

        Raises:
            OSError: the disk is full or failed.
        """
        for name, column in self._layout.items():
            if name in self._sums:
                counts = columns["key_bytes" if name == "key_end" else "num_labels"]
                values = self._sums[name] + np.cumsum(counts, dtype=np.int64)
                self._sums[name] = int(values[-1]) if len(values) else self._sums[name]
            else:
                values = columns[name]
            content = np.ascontiguousarray(values, column["dtype"]).tobytes()
            at = column["offset"] + np.dtype(column["dtype"]).itemsize * self._done[name]
            self._done[name] += len(values)
            while content:
                written = os.pwrite(self._file.fileno(), content, at)
                content, at = content[written:], at + written

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def open_columns(path: Path, layout: Mapping[str, Mapping[str, Any]], num_rows: int) -> Columns:
    """Returns the columns of an index file.

    Raises:
        ShardError: it is missing, cut short, or not the one that the manifest describes.
    """
    try:
        mapped = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise ShardError(f"the index {path} cannot be opened: {error}") from None
    head = bytes(mapped[: len(MAGIC) + 8])
    if head != struct.pack("<8sQ", MAGIC, num_rows):
        raise ShardError(f"the index {path} is damaged or of another set: its head is wrong")
    found = {}
    names = (*COLUMNS, "keys", *(("label_end", "label_values") if "label_end" in layout else ()))
    for name in names:
        try:
            entry = layout[name]
            dtype = np.dtype(_DTYPES[name])
            start, length = operator.index(entry["offset"]), operator.index(entry["length"])
            is_ours = entry["dtype"] == dtype.str and start >= ALIGNMENT and length >= 0
        except (KeyError, OverflowError, TypeError, ValueError):
            is_ours = False
        if not is_ours:
            raise ShardError(f"the manifest beside {path} does not describe its column '{name}'")
        stop = start + dtype.itemsize * length
        if stop > len(mapped) or (name not in ("keys", "label_values") and length != num_rows):
            raise ShardError(f"the index {path} is cut short: column '{name}' ends at byte {stop} of {len(mapped)}")
        found[name] = mapped[start:stop].view(dtype)
    return Columns(**found)


def wrong_label(columns: Columns, num_classes: int) -> tuple[int, str] | None:
    """Returns the first row with a label that is none of the classes, and what it is; None where all are right."""
    wrong = (columns.label < -1) | (columns.label >= num_classes)
    if wrong.any():
        row = int(np.argmax(wrong))
        return row, f"label {columns.label[row]} is none of {num_classes} classes"
    if columns.label_values is not None and columns.label_end is not None:
        wrong = (columns.label_values < 0) | (columns.label_values >= num_classes)
        if wrong.any():
            at = int(np.argmax(wrong))
            row = min(int(np.argmax(columns.label_end > at)), len(columns.label_end) - 1)
            return row, f"label {columns.label_values[at]} is none of {num_classes} classes"
    return None


def wrong_row(columns: Columns, num_classes: int) -> tuple[int, str] | None:
    """Returns the first row whose key or labels cannot be, and what is wrong; None where all can.

    What this does not look at is compared when an image is read.
    """
    for name, ends, total in (
        ("key", columns.key_end, len(columns.keys)),
        ("label", columns.label_end, 0 if columns.label_values is None else len(columns.label_values)),
    ):
        if ends is None or not len(ends):
            continue
        starts = np.concatenate((np.zeros(1, ends.dtype), ends[:-1]))
        wrong = (starts > ends) | (ends > total) | ((starts == ends) & (name == "key"))
        wrong[-1] |= ends[-1] != total
        if wrong.any():
            row = int(np.argmax(wrong))
            return row, f"its {name}s are said to be {starts[row]} to {ends[row]} of {total}"
    return wrong_label(columns, num_classes)
