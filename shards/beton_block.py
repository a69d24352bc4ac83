"""What our ``.beton`` files hold beyond FFCV's format: keys, checksums, class names, in a region that FFCV never reads.

The block lies between the last sample and the allocation table and ends in a trailer of fixed size, so that it is
found from the file's header.  All else but the images follows from it.
"""

import json
import os
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestri.shards.beton_format import MAX_SIDE, read_exactly
from maestri.shards.errors import ShardError
from maestri.shards.listing import Strings

MAGIC, END_MAGIC = b"MSTRBTN1", b"1NTBRTSM"
ALIGNMENT = 64
COLUMNS: dict[str, str] = {
    "offset": "<u8",
    "bytes": "<u4",
    "width": "<u4",
    "height": "<u4",
    "crc32": "<u4",
    "label": "<i4",
    "key_bytes": "<u4",
    "num_labels": "<u4",
    "orientation": "u1",
    "stored": "u1",
}
"""One value per row, dense; ``label_values`` and ``keys`` and the class names stand behind them."""
_TRAILER = struct.Struct("<8sQQQIIIII4x8s")
"""Magic; start, rows, bytes of keys; label values, bytes of class names, classes, page size; CRC-32; zeros; magic."""
TRAILER_BYTES = _TRAILER.size
_UNSAFE = re.compile(r"[.\\\s\x00-\x1f\x7f]|^/")
"""What escaped keys do not hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """The block's content."""

    columns: dict[str, NDArray[Any]]
    """As a shard's writer leaves them."""
    class_names: tuple[str, ...]
    """As in the manifest; may be empty."""
    num_classes: int
    """Length of each label where images may have several; 0 where labels are integers."""
    page_size: int
    """Bytes."""
    start: int
    """First byte of the block in the file."""
    end: int
    """One behind the last: where the allocation table starts."""

    @property
    def keys(self) -> Strings:
        """Keys of all rows."""
        return Strings(self.columns["keys"], np.cumsum(self.columns["key_bytes"]))


def encode(
    columns: Mapping[str, NDArray[Any]], *, class_names: Sequence[str], num_classes: int, page_size: int, start: int
) -> bytes:
    """Returns the block's bytes, trailer included, to be written from byte ``start`` on."""
    num_rows, names = len(columns["offset"]), json.dumps(list(class_names)).encode() if class_names else b""
    none: dict[str, NDArray[Any]] = {"num_labels": np.zeros(num_rows, np.int64), "label_values": np.zeros(0, np.int32)}
    filled = {**none, **columns}
    parts = [np.ascontiguousarray(filled[name], dtype).tobytes() for name, dtype in COLUMNS.items()]
    values, keys = filled["label_values"].astype("<i4"), filled["keys"].tobytes()
    body = b"".join([*parts, values.tobytes(), keys, names])
    body += bytes(-(start + len(body)) % 8)
    numbers = (start, num_rows, len(keys), len(values), len(names), num_classes, page_size)
    crc = zlib.crc32(_TRAILER.pack(MAGIC, *numbers, 0, END_MAGIC), zlib.crc32(body))
    return body + _TRAILER.pack(MAGIC, *numbers, crc, END_MAGIC)


def find(path: Path, file: int, alloc_table_ptr: int) -> Block | None:
    """Returns the block that ends where the allocation table starts, None where there is none of ours.

    Raises:
        ShardError: there is one, and it is damaged.
    """
    at = alloc_table_ptr - TRAILER_BYTES
    if at < 0 or alloc_table_ptr > os.fstat(file).st_size:
        return None
    trailer = read_exactly(path, file, TRAILER_BYTES, at)
    magic, start, num_rows, key_bytes, num_values, names_bytes, num_classes, page_size, crc, end_magic = (
        _TRAILER.unpack(trailer)
    )
    if magic != MAGIC and end_magic != END_MAGIC:
        return None
    per_row = sum(np.dtype(dtype).itemsize for dtype in COLUMNS.values())
    size = per_row * num_rows + 4 * num_values + key_bytes + names_bytes
    if start + size + (-(start + size) % 8) != at:
        raise ShardError(f"{path}: its block of keys and checksums is damaged: the sizes at byte {at} do not add up")
    body = read_exactly(path, file, at - start, start)
    if crc != zlib.crc32(trailer[:48] + bytes(4) + trailer[52:], zlib.crc32(body)):
        raise ShardError(f"{path}: its block of keys and checksums (byte {start} to {at}) is damaged: wrong CRC-32")
    columns: dict[str, NDArray[Any]] = {}
    position = 0
    for name, dtype in COLUMNS.items():
        values = np.frombuffer(body, dtype, num_rows, position)
        columns[name] = values.astype(np.int64)
        position += values.nbytes
    columns["label_values"] = np.frombuffer(body, "<i4", num_values, position).astype(np.int32)
    position += 4 * num_values
    columns["keys"] = np.frombuffer(body, np.uint8, key_bytes, position)
    names = _names(path, body[position + key_bytes : position + key_bytes + names_bytes])
    _check(path, columns, num_classes)
    if not num_classes:
        del columns["num_labels"], columns["label_values"]
    return Block(
        columns=columns, class_names=names, num_classes=num_classes, page_size=page_size, start=start,
        end=alloc_table_ptr,
    )  # fmt: skip


def _names(path: Path, text: bytes) -> tuple[str, ...]:
    try:
        names = json.loads(text) if text else []
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ShardError(f"{path}: its block of keys and checksums holds no list of class names")
    return tuple(names)


def _check(path: Path, columns: Mapping[str, NDArray[Any]], num_classes: int) -> None:
    """Refuses a block that was made up: its checksum is right and its content is not."""
    values = columns["label_values"]
    is_whole = (
        columns["key_bytes"].sum() == len(columns["keys"])
        and columns["num_labels"].sum() == len(values)
        and ((values >= 0) & (values < max(num_classes, 0))).all()
        and (columns["bytes"] > 0).all()
        and (columns["label"] >= -1).all()
        and (np.maximum(columns["width"], columns["height"]) <= MAX_SIDE).all()
        and (columns["key_bytes"] > 0).all()
    )
    if not is_whole or not _are_keys(Strings(columns["keys"], np.cumsum(columns["key_bytes"]))):
        raise ShardError(f"{path}: the columns in its block of keys and checksums do not fit together")


def _are_keys(keys: Strings) -> bool:
    """Returns whether all are unique and could become names in a tar: none leads out of a folder."""
    try:
        texts = [text.encode().decode() for text in keys]
    except UnicodeError:
        return False
    return len(set(texts)) == len(texts) and not any(_UNSAFE.search(text) for text in texts)
