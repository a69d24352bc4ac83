"""Tars with damage of all kinds: each is refused by name, or listed with places that lie within the file.

``MUTATIONS=20000 pytest tests/shards/test_mutated_tars.py`` tries more of them.
"""

import io
import os
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from maestri.shards.errors import ShardError
from maestri.shards.sources.class_tars import ClassTarsSource, ImageTarSource
from maestri.shards.sources.tar_archives import TarImages, open_tars
from maestri.shards.sources.tar_index import BLOCK, tar_members
from maestri.shards.sources.webdataset_tars import WebDatasetSource

MUTATIONS = int(os.environ.get("MUTATIONS", "300"))
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
FIELDS = ((0, 100), (124, 136), (148, 156), (156, 157), (157, 257), (257, 265), (345, 500))
SPICE = (b"\0", b"\xff", b"/", b"../", b".", b"7", b"9", b"x", b"L", b"K", b"g", b"S", b"\x80", b"\n", b" ", b"5", b"1")


def whole(format_name: str, kind: str) -> bytes:
    """Returns a small sound tar with names long enough for each format's extensions."""
    buffer = io.BytesIO()
    long = "" if format_name == "ustar" else "é" * 120
    members = {f"c{at % 2}/{long}{at}.{e}": b"%d" % at * 300 for at in range(4) for e in ("jpg", "txt")}
    if kind == "nested":
        inner = whole(format_name, "plain")
        members = {"a.tar": inner, "b.tar": inner}
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[format_name]) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def mutations(data: bytes, seed: int) -> Iterator[bytes]:
    """Yields damaged versions of a tar, without end."""
    generator = random.Random(seed)
    headers = [at for at in range(0, len(data), BLOCK) if data[at + 257 : at + 262] == b"ustar"]
    while True:
        mutated = bytearray(data)
        for _ in range(generator.randrange(1, 4)):
            choice = generator.randrange(6)
            at = generator.choice(headers)
            if choice == 0:
                del mutated[generator.randrange(len(mutated) + 1) :]
            elif choice == 1 and mutated:
                mutated[generator.randrange(len(mutated))] ^= 1 << generator.randrange(8)
            elif choice == 2:
                start = generator.randrange(0, len(mutated) + 1, BLOCK)
                mutated[start:start] = mutated[at : at + BLOCK * generator.randrange(1, 4)]
            elif choice == 3:
                del mutated[at : at + generator.choice((1, 17, BLOCK, 3 * BLOCK))]
            else:  # a field is changed, and the checksum made right again
                start, stop = generator.choice(FIELDS)
                value = generator.choice(SPICE) * generator.choice((1, 2, 11, 12, 100))
                place = at + generator.randrange(start, stop)
                mutated[place : place + len(value)] = value
                _mend(mutated, at)
        yield bytes(mutated)


def _mend(data: bytearray, at: int) -> None:
    block = data[at : at + BLOCK]
    if len(block) == BLOCK:
        block[148:156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(block)


def check(path: Path, source: TarImages) -> bool:
    """Returns whether a source could be listed; what is listed must be readable and have sane keys."""
    size = path.stat().st_size
    try:
        listing = source.listing()
    except ShardError as error:
        source.close()
        text = str(error)
        assert "\n" not in text and path.name in text and len(text) < 1000
        return False
    for place in listing.places.tolist():
        assert place[0] == 0 and 0 <= place[1] <= place[1] + place[2] <= size
    keys = list(listing.keys)
    assert len(set(keys)) == len(keys)
    for at, key in enumerate(keys):
        assert ".." not in key.split("/") and not key.startswith("/") and "." not in key
        assert unquote(key, errors="surrogateescape")
        assert len(source.load(listing.names[at], listing.places[at])) == listing.sizes[at]
    source.close()
    return True


@pytest.mark.parametrize("kind", ["plain", "nested"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_mutated_tars__are_refused_or_listed_soundly(tmp_path: Path, format_name: str, kind: str) -> None:
    data = whole(format_name, kind)
    path = tmp_path / "mutated.tar"
    outcomes = set()
    for _, mutated in zip(range(MUTATIONS), mutations(data, seed=len(format_name + kind)), strict=False):
        path.write_bytes(mutated)
        try:
            list(tar_members(path))
        except ShardError as error:
            assert str(path) in str(error)
        nested = ClassTarsSource(path, [path], is_nested=True)
        sources = [nested] if kind == "nested" else [WebDatasetSource(path, [path]), ImageTarSource(path, path)]
        outcomes |= {check(path, source) for source in sources}
        try:
            open_tars(path)
        except ShardError as error:
            assert str(path) in str(error)
    assert outcomes == {True, False}
