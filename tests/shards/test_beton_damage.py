"""Damaged and hostile ``.beton`` files."""

import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from maestri.shards import beton_block
from maestri.shards.beton_format import HEADER, Beton
from maestri.shards.beton_rows import damage, our_block
from maestri.shards.beton_shard import FIXED_BYTES, ROW_BYTES
from maestri.shards.errors import ShardError
from maestri.shards.images import BadImage
from maestri.shards.sources.beton import BetonSource


@pytest.fixture(scope="module")
def mutations(load_module: Callable[[str], ModuleType]) -> ModuleType:
    return load_module("beton_mutations")


@pytest.fixture(scope="module", params=[0, 5], ids=["one label", "several labels"])
def whole(mutations: ModuleType, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("beton") / "whole.beton"
    mutations.example(path, request.param)
    return path


def test_readers__mutations_are_refused_or_harmless(mutations: ModuleType, tmp_path: Path) -> None:
    assert list(mutations.problems(tmp_path, 600)) == []


def test_damage__every_flipped_byte_is_named(whole: Path, tmp_path: Path) -> None:
    data = bytearray(whole.read_bytes())
    beton = Beton(whole)
    block = our_block(beton)
    assert block is not None
    columns = block.columns
    head, first, last = beton.tables_end, int(columns["offset"][0]), int(columns["offset"][-1] + columns["bytes"][-1])
    dice = random.Random(0)
    places = [*range(0, 24), *range(FIXED_BYTES, head), *range(last, len(data))]
    places += dice.sample(range(24, FIXED_BYTES), 100) + dice.sample(range(head, first), 50)
    places += dice.sample(range(first, last), 200)
    path = tmp_path / "x.beton"
    path.write_bytes(data)
    assert list(damage(path)) == []
    with path.open("r+b") as file:
        for place in places:
            os.pwrite(file.fileno(), bytes((data[place] ^ 1 << dice.randrange(8),)), place)
            found = list(damage(path))
            assert found, place
            assert all(str(path) in line for line in found)
            row = _row_at(place, head, columns)
            if row is not None:
                assert any(f"row {row} (folder/{row})" in line for line in found), (place, found)
            os.pwrite(file.fileno(), data[place : place + 1], place)
    assert list(damage(path)) == []


def _row_at(place: int, head: int, columns: dict[str, np.ndarray]) -> int | None:
    if FIXED_BYTES <= place < head:
        return (place - FIXED_BYTES) // ROW_BYTES
    inside = (columns["offset"] <= place) & (place < columns["offset"] + columns["bytes"])
    return int(np.argmax(inside)) if inside.any() else None


def edited(whole: Path, path: Path, **fields: int) -> Path:
    """Returns a copy with other numbers in its header."""
    data = bytearray(whole.read_bytes())
    header = np.frombuffer(data, HEADER, 1)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 3}, "is no FFCV file of version 2: it starts with 3"),
        ({"page_size": 3 << 20}, "pages of 3145728 bytes; expected a power of two"),
        ({"page_size": 0}, "pages of 0 bytes"),
        ({"num_fields": 0}, "0 fields and 9 samples are no sane numbers"),
        ({"num_fields": 900}, "is cut short: its descriptions of fields ends at byte"),
        ({"num_samples": 1 << 60}, "2 fields and 1152921504606846976 samples are no sane numbers"),
        ({"num_samples": 1 << 30}, "is cut short: its metadata table ends at byte"),
        ({"alloc_table_ptr": 1 << 62}, "its header puts the allocation table at byte 4611686018427387904"),
        ({"alloc_table_ptr": 100}, "its header puts the allocation table at byte 100"),
        ({"num_samples": 10}, "row 9, field 'image'"),
    ],
)
def test_beton__absurd_headers_are_named(whole: Path, tmp_path: Path, fields: dict[str, int], message: str) -> None:
    with pytest.raises(ShardError, match=message):
        BetonSource(edited(whole, tmp_path / "x.beton", **fields)).listing()


def test_find__block_that_was_made_up(whole: Path, tmp_path: Path) -> None:
    """Its checksum is right, but a key leads out of the folder it may once be unpacked into."""
    data = whole.read_bytes()
    at = Beton(whole).alloc_table_ptr - beton_block.TRAILER_BYTES
    start = int.from_bytes(data[at + 8 : at + 16], "little")
    body = data[start:at].replace(b"folder/3", b"../../et")
    trailer = data[at : at + 48] + bytes(4) + data[at + 52 : at + 64]
    checksum = zlib.crc32(trailer, zlib.crc32(body)).to_bytes(4, "little")
    path = tmp_path / "x.beton"
    path.write_bytes(data[:start] + body + trailer[:48] + checksum + trailer[52:] + data[at + 64 :])
    with pytest.raises(ShardError, match="the columns in its block of keys and checksums do not fit together"):
        BetonSource(path).listing()


def test_load__file_that_became_shorter(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    path.write_bytes(whole.read_bytes())
    source = BetonSource(path)
    listing = source.listing()
    path.write_bytes(whole.read_bytes()[: int(listing.places[-1, 0]) + 10])
    with pytest.raises(BadImage, match="cut short: 10 of"):
        source.load("", listing.places[-1])
