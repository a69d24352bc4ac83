"""Images that may bring a decoder down: JPEGs that lie in their headers, PNGs with right checksums, and any damage."""

import importlib.util
import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

Segments = list[bytearray]
"""A JPEG's start marker, its segments before the first scan, and, from that scan's header on, the rest."""

_path = Path(__file__).resolve().parent.parent / "shards" / "jpeg_mutations.py"
_spec = importlib.util.spec_from_file_location(_path.stem, _path)
assert _spec is not None and _spec.loader is not None
_JPEGS = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_JPEGS)


def sound_image() -> bytes:
    """Returns an undamaged JPEG."""
    image: bytes = _JPEGS.examples()[0]
    return image


def segments_of(data: bytes) -> Segments:
    """Returns the start marker, each segment, and, from the first scan's header on, the rest."""
    parts, at = [bytearray(data[:2])], 2
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        parts.append(bytearray(data[at:end]))
        at = end
    return [*parts, bytearray(data[at:])]


def _of(parts: Segments, *markers: int) -> bytearray:
    return next((part for part in parts[1:] if part[1] in markers), parts[-1])


def _frame(dice: random.Random, parts: Segments) -> None:
    """Another precision, size, number of components, sampling or table."""
    frame = _of(parts, 0xC0, 0xC2)
    field = dice.choice(("precision", "size", "huge", "channels", "each"))
    if field == "precision":
        frame[4] = dice.choice((0, 1, 12, 16))
    elif field == "size":
        side = dice.choice((0, 1, 2, 7, 9, 63, 255, 4096, dice.randrange(1 << 16)))
        struct.pack_into(">H", frame, dice.choice((5, 7)), side)
    elif field == "huge":
        struct.pack_into(">HH", frame, 5, dice.choice((1200, 16000, 65500, 65535)), dice.choice((1200, 16000, 65535)))
    elif field == "channels":
        frame[9] = dice.choice((0, 1, 2, 3, 4, 255))
    else:
        frame[dice.randrange(10, len(frame))] = dice.choice((0, 1, 2, 3, 0x11, 0x12, 0x14, 0x41, 0x44, 0xFF))


def _kind(dice: random.Random, parts: Segments) -> None:
    """Another kind of frame: progressive, lossless, arithmetic."""
    _of(parts, 0xC0, 0xC2)[1] = dice.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC9, 0xCA, 0xCB))


def _several(dice: random.Random, parts: Segments) -> None:
    """Any segment once more, anywhere; a frame, too."""
    parts.insert(dice.randrange(1, len(parts)), bytearray(dice.choice(parts[1:-1])))


def _missing(dice: random.Random, parts: Segments) -> None:
    del parts[dice.randrange(1, len(parts) - 1)]


def _longer(dice: random.Random, parts: Segments) -> None:
    """A segment longer or shorter than what it holds, its length being right."""
    part = parts[dice.randrange(1, len(parts) - 1)]
    if dice.random() < 0.5:
        part += dice.randbytes(dice.choice((1, 16, 65, 300)))
    else:
        del part[max(4, len(part) - dice.choice((1, 3, 20))) :]
    struct.pack_into(">H", part, 2, len(part) - 2)


def _tables(dice: random.Random, parts: Segments) -> None:
    """Impossible Huffman or quantisation tables."""
    table = _of(parts, dice.choice((0xC4, 0xDB)))
    for _ in range(dice.choice((1, 4, 16))):
        table[dice.randrange(4, min(len(table), 24))] = dice.choice((0, 1, 0x10, 0x13, 0xFF, dice.randrange(256)))


def _scan(dice: random.Random, parts: Segments) -> None:
    """Another component, table or range of coefficients in the first scan's header."""
    parts[-1][dice.randrange(2, 14)] = dice.choice((0, 1, 2, 3, 4, 0x11, 0x33, 63, 64, 255))


def _restart(dice: random.Random, parts: Segments) -> None:
    interval = dice.choice((0, 1, 2, 5, 65535))
    parts.insert(dice.randrange(1, len(parts)), bytearray(struct.pack(">BBHH", 0xFF, 0xDD, 4, interval)))


def _scans(dice: random.Random, parts: Segments) -> None:
    """The first scan many times over."""
    scan = bytes(parts[-1][:-2])
    parts[-1][:-2] = scan[: dice.choice((20, 200, len(scan)))] * dice.choice((2, 10, 400))


HEADER_MUTATIONS: tuple[Callable[[random.Random, Segments], None], ...] = (
    _frame,
    _frame,
    _kind,
    _several,
    _missing,
    _longer,
    _tables,
    _tables,
    _scan,
    _restart,
    _scans,
)


def lying_jpeg(dice: random.Random, whole: bytes) -> tuple[str, bytes]:
    """Returns what was done to a whole JPEG's segments, and the JPEG."""
    parts, names = segments_of(whole), []
    for _ in range(dice.choice((1, 1, 2))):
        mutation = dice.choice(HEADER_MUTATIONS)
        with suppress(ValueError, IndexError, struct.error):  # another mutation left too little of a segment
            mutation(dice, parts)
            names.append(mutation.__name__.strip("_"))
    return f"JPEG: {', '.join(names)}", b"".join(parts)


def damaged_png(dice: random.Random) -> tuple[str, bytes]:
    """Returns what was done to a PNG's chunks, and the PNG; checksums are right, so that decoders believe the rest."""
    buffer = io.BytesIO()
    image = Image.fromarray(np.random.default_rng(dice.randrange(99)).integers(0, 255, (20, 30, 3), np.uint8))
    image.convert(dice.choice(("RGB", "L", "P", "RGBA", "1", "LA"))).save(buffer, "PNG")
    data, at, chunks = buffer.getvalue(), 8, []
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], bytearray(data[at + 8 : at + 8 + size])))
        at += 12 + size
    kind, body = chunks[dice.choice((0, 0, *range(len(chunks) - 1)))]
    what = dice.choice(("flip", "size", "cut", "repeat"))
    if what == "flip":
        body[dice.randrange(len(body))] ^= 1 << dice.randrange(8)
    elif what == "size":
        struct.pack_into(">I", chunks[0][1], dice.choice((0, 4)), dice.choice((0, 1, 31, 5000, 1 << 20, 1 << 31)))
    elif what == "cut":
        del body[dice.randrange(len(body)) :]
    else:
        chunks.insert(dice.randrange(1, len(chunks)), (kind, body))
    parts = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return f"PNG: {what} {kind.decode()}", data[:8] + b"".join(parts)


def images(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yields names and bytes of damaged images: a third anywhere, the others with sound lengths and sums."""
    dice, whole = random.Random(seed), _JPEGS.examples()
    anywhere = _JPEGS.mutants(count, seed)
    for number in range(count):
        if number % 3 == 0:
            yield next(anywhere)
        else:
            name, data = damaged_png(dice) if dice.random() < 0.15 else lying_jpeg(dice, dice.choice(whole))
            yield f"{number}: {name}", data
