"""Rows of the index from a ``.beton`` alone, and whether its bytes are those that were written."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32

from maestri.shards import beton_block
from maestri.shards.beton_block import Block
from maestri.shards.beton_fields import Labels
from maestri.shards.beton_format import HEADER, REGION, Beton, read_exactly
from maestri.shards.beton_shard import FIXED_BYTES, ROW_BYTES, marks_of, tables
from maestri.shards.errors import ShardError

_CHUNK = 1 << 22


def our_block(beton: Beton) -> Block | None:
    """Returns our block of a file, None where there is none.

    Raises:
        ShardError: it is damaged or not of these samples.
    """
    with beton.path.open("rb") as file:
        block = beton_block.find(beton.path, file.fileno(), beton.alloc_table_ptr)
        for problem in _wrong_tables(beton.path, file.fileno(), block) if block is not None else ():
            raise ShardError(problem)
    return block


def labels_of(block: Block) -> Labels:
    """Returns the labels of a file of ours, in the order in which they were given."""
    columns = block.columns
    first = columns["label"].astype(np.int32)
    if not block.num_classes:
        return Labels(first=first, num_classes=int(first.max(initial=-1)) + 1)
    return Labels(
        first=first,
        num_classes=block.num_classes,
        ends=np.cumsum(columns["num_labels"]),
        values=columns["label_values"],
    )


def damage(path: Path) -> Iterator[str]:
    """Yields a line for each thing that is wrong in a file of ours, by row and key.  Reads every byte.

    A file without our block has nothing to be compared with: only its tables are checked.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as opened:
        file = opened.fileno()
        try:
            block = _block(path, file)
        except ShardError as error:
            yield str(error)
            return
        if block is None:
            try:
                Beton(path)
            except ShardError as error:
                yield str(error)
            else:
                yield f"{path} has no block of keys and checksums: it is not of our making, or its end is damaged"
            return
        yield from _wrong_tables(path, file, block)
        yield from _wrong_rows(path, file, block)


def _block(path: Path, file: int) -> Block | None:
    """Returns the block, found from the header or, where that is damaged, from the file's end."""
    size = os.fstat(file).st_size
    if size < HEADER.itemsize:
        raise ShardError(f"{path} is cut short: it has {size} bytes")
    header = np.frombuffer(read_exactly(path, file, HEADER.itemsize, 0), HEADER)[0]
    tables_bytes = REGION.itemsize * int(header["num_samples"])
    for end in (int(header["alloc_table_ptr"]), size - tables_bytes, size - 2 * tables_bytes):
        block = beton_block.find(path, file, end)
        if block is not None:
            return block
    return None


def _wrong_tables(path: Path, file: int, block: Block) -> Iterator[str]:
    """Compares header, metadata and allocation table with what the block says they were."""
    size, keys = os.fstat(file).st_size, block.keys
    head, regions = tables(block.columns, num_classes=block.num_classes, page_size=block.page_size, end=block.end)
    if size != block.end + len(regions):
        yield f"{path} has {size} bytes; expected {block.end + len(regions)}"
    found = os.pread(file, len(head), 0)
    if found[:FIXED_BYTES] != head[:FIXED_BYTES]:
        yield f"{path}: its header or the description of its fields (bytes 0 to {FIXED_BYTES}) is not what was written"
    for row in _different_rows(found[FIXED_BYTES:], head[FIXED_BYTES:], len(keys)):
        yield f"{path}: row {row} ({keys[row]}): its entry in the metadata table is not what was written"
    for row in _different_rows(os.pread(file, len(regions), block.end), regions, len(keys)):
        yield f"{path}: row {row} ({keys[row]}): its entry in the allocation table is not what was written"


def _different_rows(found: bytes, expected: bytes, num_rows: int) -> Iterator[int]:
    if found == expected or not num_rows:
        return
    size = len(expected) // num_rows
    for row in range(num_rows):
        if found[row * size : (row + 1) * size] != expected[row * size : (row + 1) * size]:
            yield row


def _wrong_rows(path: Path, file: int, block: Block) -> Iterator[str]:
    """Compares each image and label with the block, and all between them with zeros."""
    columns, keys = block.columns, block.keys
    rows = zip(columns["offset"].tolist(), columns["bytes"].tolist(), columns["crc32"].tolist(), strict=True)
    ends = np.cumsum(columns["num_labels"]).tolist() if block.num_classes else []
    at = FIXED_BYTES + len(keys) * ROW_BYTES
    for row, (offset, size, checksum) in enumerate(rows):
        if not at <= offset <= offset + size + block.num_classes <= block.start:
            yield f"{path}: row {row} ({keys[row]}): bytes {offset} to {offset + size} are no place for an image"
            return
        yield from _not_zero(path, file, at, offset)
        if crc32(os.pread(file, size, offset)) != checksum:
            yield f"{path}: row {row} ({keys[row]}), byte {offset}: the image's CRC-32 is wrong"
        at = offset + size + block.num_classes
        if block.num_classes:
            labels = columns["label_values"][ends[row - 1] if row else 0 : ends[row]].tolist()
            if os.pread(file, block.num_classes, offset + size) != marks_of(labels, block.num_classes):
                yield f"{path}: row {row} ({keys[row]}), byte {offset + size}: its labels are not what was written"
    yield from _not_zero(path, file, at, block.start)


def _not_zero(path: Path, file: int, start: int, stop: int) -> Iterator[str]:
    """Yields a line where padding is not zeros."""
    for at in range(start, stop, _CHUNK):
        padding = np.frombuffer(os.pread(file, min(_CHUNK, stop - at), at), np.uint8)
        if padding.any():
            yield f"{path}, byte {at + int(np.argmax(padding != 0))}: padding that is not zero"
            return
