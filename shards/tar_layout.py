"""What every byte of a tar of ours should be but those of images: all of it follows from the rows."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from maestri.shards.tar_shard import LABEL, LABELS, TAR_FORMAT

_MODE = 0o444


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row of the index, of one shard."""

    key: str
    label: int
    labels: tuple[int, ...] | None
    extension: str
    """``jpg`` or ``png``."""
    bytes: int
    """Size of the image."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a shard with a name."""

    row: int
    """Which sample they belong to, from 0; the number of samples for the end of the file."""
    what: str
    """What they are."""
    offset: int
    """Where they start."""
    content: bytes | None
    """What they should be; None for an image."""
    size: int
    """How many."""


def pieces_of(rows: list[Row]) -> Iterator[Piece]:
    """Yields all of a shard, byte after byte."""
    at = 0
    for number, row in enumerate(rows):
        label = json.dumps({"labels": row.labels}) if row.labels is not None else str(row.label)
        if row.labels is not None or row.label >= 0:
            extension = LABELS if row.labels is not None else LABEL
            for what, content in _member(f"{row.key}.{extension}", label.encode()):
                yield Piece(number, what, at, content, len(content))
                at += len(content)
        head = _header(f"{row.key}.{row.extension}", row.bytes)
        yield Piece(number, f"tar header of {row.key}.{row.extension}", at, head, len(head))
        at += len(head)
        yield Piece(number, f"image {row.key}", at, None, row.bytes)
        at += row.bytes
        padding = bytes(-at % tarfile.BLOCKSIZE)
        yield Piece(number, f"padding after {row.key}.{row.extension}", at, padding, len(padding))
        at += len(padding)
    end = 2 * tarfile.BLOCKSIZE
    end += -(at + end) % tarfile.RECORDSIZE
    yield Piece(len(rows), "end of the tar", at, bytes(end), end)


def _member(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    yield f"tar header of {name}", _header(name, len(content))
    yield f"content of {name}", content
    yield f"padding after {name}", bytes(-len(content) % tarfile.BLOCKSIZE)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, _MODE, 0
    return info.tobuf(TAR_FORMAT, "utf-8", "surrogateescape")
