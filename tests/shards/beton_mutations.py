"""Damaged and hostile ``.beton`` files, made from a whole one: for tests, and by the thousand from the command line.

python tests/shards/beton_mutations.py 100000 [SEED]
"""

import io
import random
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from maestri.shards import beton_block
from maestri.shards.beton_format import FIELD, HEADER, REGION, Beton
from maestri.shards.beton_rows import damage, our_block
from maestri.shards.beton_shard import FIXED_BYTES, BetonShard, tables
from maestri.shards.errors import ShardError
from maestri.shards.images import store
from maestri.shards.rows import Sample
from maestri.shards.sources.beton import BetonSource

ODD_NUMBERS = (
    0,
    1,
    2,
    7,
    255,
    1 << 15,
    1 << 20,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)


def mutated(whole: bytes, dice: random.Random) -> tuple[str, bytes]:
    """Returns what was done to a file of ours, and the result."""
    data = bytearray(whole)
    header = np.frombuffer(whole, HEADER, 1)[0]
    table, size = int(header["alloc_table_ptr"]), len(whole)
    tables = [(0, HEADER.itemsize), (HEADER.itemsize, FIXED_BYTES), (table - 1000, table), (table, size)]
    tables.append((FIXED_BYTES, FIXED_BYTES + 24 * int(header["num_samples"])))
    start, stop = dice.choice(tables)
    kind = dice.choice(("bit", "byte", "number", "cut", "grown", "swap", "zeros", "several"))
    if kind == "bit":
        at = dice.randrange(start, stop)
        data[at] ^= 1 << dice.randrange(8)
    elif kind == "byte":
        at = dice.randrange(size)
        data[at] = dice.randrange(256)
    elif kind == "number":
        fields = [(HEADER.fields or {})[name] for name in HEADER.names or ()]
        fields += [(np.dtype("u1"), HEADER.itemsize + at * FIELD.itemsize) for at in range(2)]
        fields += [(np.dtype("<u8"), at) for at in range(table, size, 8)]
        fields += [(np.dtype("<u8"), at) for at in range(table - 64, table, 8)]
        dtype, at = dice.choice(fields)[:2]
        value = dice.choice((*ODD_NUMBERS, size, table, size - 1, dice.randrange(size)))
        data[at : at + dtype.itemsize] = struct.pack("<Q", value)[: dtype.itemsize]
    elif kind == "cut":
        at = dice.choice((dice.randrange(size), size - REGION.itemsize * dice.randrange(1, 4), table))
        del data[at:]
    elif kind == "grown":
        at = dice.choice((size, table, dice.randrange(size)))
        data[at:at] = bytes(dice.choice((1, 24, 64, 4096)))
    elif kind == "swap":
        width = dice.choice((8, 24))
        at, other = (dice.randrange(start, max(start + 1, stop - width)) for _ in range(2))
        data[at : at + width], data[other : other + width] = data[other : other + width], data[at : at + width]
    elif kind == "zeros":
        at = dice.randrange(start, stop)
        data[at : at + 24] = bytes(len(data[at : at + 24]))
    else:
        at = start
        for _ in range(5):
            data[dice.randrange(start, stop)] = dice.randrange(256)
    return f"{kind} at {at}", bytes(data)


def problem_with(path: Path, whole: bytes, expected: Path) -> str:
    """Returns what our readers did wrong with a mutation; nothing where they refused it or gave what was written."""
    data = path.read_bytes()
    source = BetonSource(path)
    try:
        listing = source.listing()
        images = [source.load("", place) for place in listing.places]
    except ShardError as error:
        if "\n" in str(error) or str(path) not in str(error):
            return f"an error of other than one line that names the file: {error}"
    else:
        original = BetonSource(expected).listing()
        is_same = listing.keys == original.keys and np.array_equal(listing.places, original.places)
        if _has_block(path) and not (is_same and np.array_equal(listing.labels, original.labels)):
            return "other samples than were written"
        if any(not isinstance(image, bytes) or image not in data for image in images):
            return "bytes that are not in the file"
    found = _first_damage(path)
    if _has_block(expected) and bool(found) != (data != whole):
        return f"damage says {found!r}"
    try:
        block, whole_block = our_block(Beton(path)), our_block(Beton(expected))
    except ShardError:
        return ""
    if block is None or whole_block is None:
        return ""
    is_same = all(np.array_equal(values, block.columns[name]) for name, values in whole_block.columns.items())
    return "" if is_same else "other rows than were written"


def _first_damage(path: Path) -> str:
    return next(damage(path), "")


def _has_block(path: Path) -> bool:
    return "has no block" not in _first_damage(path)


def example(path: Path, num_classes: int) -> bytes:
    """Writes a small file of ours and returns its bytes."""
    samples = []
    for at in range(9):
        buffer = io.BytesIO()
        Image.new("RGB", (20 + at, 30), (at, 9 * at, 200)).save(buffer, "JPEG")
        labels = (at % 3, 4) if num_classes else None
        samples.append(Sample(key=f"folder/{at}", label=at % 3, labels=labels, image=store(buffer.getvalue())))
    with BetonShard(path, num_classes=num_classes, class_names=["a", "b", "c", "d", "é"]) as shard:
        for sample in samples:
            shard.add(sample)
    return path.read_bytes()


def without_block(path: Path) -> bytes:
    """Takes our block out of a file of ours, as if FFCV had written it, and returns its bytes."""
    with path.open("rb") as file:
        block = beton_block.find(path, file.fileno(), Beton(path).alloc_table_ptr)
    assert block is not None
    head, regions = tables(block.columns, num_classes=block.num_classes, page_size=block.page_size, end=block.start)
    data = head + path.read_bytes()[len(head) : block.start] + regions
    path.write_bytes(data)
    return data


def problems(folder: Path, count: int, seed: int = 0) -> Iterator[str]:
    """Yields each mutation of ``count`` that our readers did not take as they should."""
    dice = random.Random(seed)
    for num_classes, is_ours in ((0, True), (5, True), (5, False)):
        whole = example(folder / "whole.beton", num_classes)
        if not is_ours:
            whole = without_block(folder / "whole.beton")
        for _ in range(count // 3):
            kind, data = mutated(whole, dice)
            (folder / "mutated.beton").write_bytes(data)
            try:
                problem = problem_with(folder / "mutated.beton", whole, folder / "whole.beton")
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            if problem:
                yield f"{kind}, {num_classes} classes{'' if is_ours else ', no block'}: {problem}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        failed = 0
        for line in problems(Path(temporary), int(sys.argv[1]), int((sys.argv + ["0"])[2])):
            failed += 1
            print(line, flush=True)
    print(f"{failed} problems")
    sys.exit(bool(failed))
