"""``index.bin``: a row per sample, stored by column and memory-mapped.

The file is a 64-byte head (magic ``MSTRIDX1``, number of rows as little-endian uint64, zeros) and then the columns,
each starting at a multiple of 64 bytes, little-endian.  Where each starts is in the manifest.  Opening it reads
nothing but the head.
"""

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
"""One value per row; ``keys`` (bytes) stands behind them."""


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
    """What was stored, as ``images`` numbers it: 0 the source's bytes, 1 transcoded, 2 an end marker was added."""
    label: NDArray[np.int32]
    """Position in the manifest's class names; −1 for none."""
    crc32: NDArray[np.uint32]
    """CRC-32 of the stored image."""
    key_end: NDArray[np.uint64]
    """Where the row's key ends in ``keys``; it starts where the row before ends."""
    keys: NDArray[np.uint8]
    """All keys, UTF-8, back to back; ``byte``."""


def encode(columns: Mapping[str, NDArray[Any]], keys: bytes) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """Returns the file's bytes and its description for the manifest."""
    num_rows = len(columns["shard"])
    content = bytearray(struct.pack("<8sQ", MAGIC, num_rows).ljust(ALIGNMENT, b"\0"))
    layout: dict[str, dict[str, Any]] = {}
    parts = {name: np.ascontiguousarray(columns[name], dtype=dtype) for name, dtype in COLUMNS.items()}
    parts["keys"] = np.frombuffer(keys, np.uint8)
    for name, values in parts.items():
        content += bytes(-len(content) % ALIGNMENT)
        layout[name] = {"dtype": values.dtype.str, "offset": len(content), "length": len(values)}
        content += values.tobytes()
    return bytes(content), layout


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
    for name in (*COLUMNS, "keys"):
        try:
            entry = layout[name]
            dtype, start, length = np.dtype(COLUMNS.get(name, "u1")), int(entry["offset"]), int(entry["length"])
            is_ours = entry["dtype"] == dtype.str and start >= ALIGNMENT and length >= 0
        except (KeyError, TypeError, ValueError):
            is_ours = False
        if not is_ours:
            raise ShardError(f"the manifest beside {path} does not describe its column '{name}'")
        stop = start + dtype.itemsize * length
        if stop > len(mapped) or (name != "keys" and length != num_rows):
            raise ShardError(f"the index {path} is cut short: column '{name}' ends at byte {stop} of {len(mapped)}")
        found[name] = mapped[start:stop].view(dtype)
    return Columns(**found)
