"""Damaged and hostile JPEGs, made from whole ones: for tests, and by the thousand from the command line.

python tests/shards/jpeg_mutations.py 10000 [SEED]
"""

import io
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from maestri.pipelines.header import image_size
from maestri.shards.images import BadImage, store
from maestri.shards.jpeg import parse_header
from maestri.shards.jpeg_damage import find_damage

Mutation = Callable[[random.Random, bytearray, int], None]
"""Changes bytes behind a position."""


def examples() -> list[bytes]:
    """Returns whole JPEGs of many kinds; the same ones each time."""
    noise = np.random.default_rng(0).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((72, 56), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[274] = 6
    kinds: list[dict[str, Any]] = [
        {},
        {"subsampling": 0, "quality": 95},
        {"restart_marker_rows": 1},
        {"restart_marker_blocks": 2, "exif": exif},
        {"progressive": True},
        {"progressive": True, "restart_marker_rows": 1, "comment": b"\xff\xd9"},
        {"exif": exif, "icc_profile": bytes(300), "optimize": True},
        {"keep_rgb": True},
    ]
    images = [_encoded(photo, **kind) for kind in kinds]
    images += [_encoded(photo.convert("L"), **kind) for kind in kinds[:5]]
    images += [_encoded(photo.convert("CMYK")), _encoded(photo.resize((1, 90))), _encoded(photo.resize((90, 1)))]
    return images


def _encoded(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _scan_at(data: bytes) -> int:
    """Returns where a whole JPEG's coded blocks start."""
    at = 2
    while data[at + 1] != 0xDA:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def _flip(dice: random.Random, data: bytearray, start: int) -> None:
    for _ in range(dice.choice((1, 1, 2, 9))):
        data[dice.randrange(start, len(data))] ^= 1 << dice.randrange(8)


def _overwrite(dice: random.Random, data: bytearray, start: int) -> None:
    at = dice.randrange(start, len(data))
    size = dice.choice((1, 2, 30))
    data[at : at + size] = dice.choice((bytes(size), b"\xff" * size, dice.randbytes(size)))


def _cut(dice: random.Random, data: bytearray, start: int) -> None:
    del data[dice.randrange(start, len(data)) :]
    if dice.random() < 0.5:
        data += b"\xff\xd9"


def _remove(dice: random.Random, data: bytearray, start: int) -> None:
    at = dice.randrange(start, len(data))
    del data[at : at + dice.choice((1, 2, 20, 300))]


def _insert(dice: random.Random, data: bytearray, start: int) -> None:
    marker = bytes((0xFF, dice.randrange(256), 0, dice.randrange(20)))
    size = dice.choice((1, 5, 200))
    at = dice.choice((dice.randrange(start, len(data)), len(data) - 2, len(data)))
    data[at:at] = dice.choice((marker, bytes(size), dice.randbytes(size)))


def _repeat(dice: random.Random, data: bytearray, start: int) -> None:
    at, to = dice.randrange(start, len(data)), dice.randrange(start, len(data))
    data[to:to] = data[at : at + dice.randrange(1, 200)]


def _markers(data: bytearray, start: int) -> list[int]:
    return [at for at in range(start, len(data) - 3) if data[at] == 0xFF and data[at + 1] not in (0x00, 0xFF)]


def _lie_in_length(dice: random.Random, data: bytearray, start: int) -> None:
    at = dice.choice(_markers(data, start) or [start])
    length = dice.choice((0, 1, 2, 3, 7, 0xFFFF, max(0, data[at + 3] - 1), dice.randrange(1 << 16)))
    data[at + 2 : at + 4] = length.to_bytes(2, "big")


def _swap_segments(dice: random.Random, data: bytearray, start: int) -> None:
    ends = sorted(dice.sample(at, 3)) if len(at := _markers(data, start)) >= 3 else []
    if ends:
        first, second, third = ends
        data[first:third] = data[second:third] + data[first:second]


def _change_marker(dice: random.Random, data: bytearray, start: int) -> None:
    at = dice.choice(_markers(data, start) or [start])
    data[at + 1] = dice.randrange(256)


MUTATIONS: tuple[Mutation, ...] = (
    _flip,
    _overwrite,
    _cut,
    _remove,
    _insert,
    _repeat,
    _lie_in_length,
    _swap_segments,
    _change_marker,
)


def mutants(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yields names and bytes of damaged JPEGs; every other one is whole up to its coded blocks."""
    dice = random.Random(seed)
    whole = examples()
    for number in range(count):
        kind = dice.randrange(len(whole))
        data = bytearray(whole[kind])
        names = []
        for _ in range(dice.choice((1, 1, 2))):
            start = _scan_at(whole[kind]) if number % 2 else 0
            mutation = dice.choice(MUTATIONS)
            if start < len(data) - 4:
                mutation(dice, data, start)
                names.append(mutation.__name__.strip("_"))
        yield f"{number}: example {kind}, {', '.join(names)}", bytes(data)


def problems(count: int, seed: int = 0) -> Iterator[str]:
    """Yields what went wrong with a damaged JPEG: anything but ``BadImage`` or an image that really decodes."""
    dice = random.Random(seed)
    for name, data in mutants(count, seed):
        options: dict[str, Any] = {
            "check": "header" if dice.random() < 0.2 else "decode",
            "mend": dice.random() < 0.3,
            "lossless": dice.random() < 0.2,
            "resize_shorter": 20 if dice.random() < 0.2 else 0,
        }
        try:
            image = store(data, **options)
        except BadImage as error:
            if not str(error) or "\n" in str(error):
                yield f"{name}, {options}: bad for {error!r}"
            continue
        except Exception as error:
            yield f"{name}, {options}: {error!r}"
            continue
        try:
            if image_size(image.data) != (image.width, image.height):
                yield f"{name}, {options}: not of the size that is said"
            if options["check"] == "decode":
                _decode(image.data, image.extension, (image.width, image.height))
        except Exception as error:
            yield f"{name}, {options}: stored, but {error!r}"


def _decode(data: bytes, extension: str, size: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged EXIF
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.size != size:
                raise ValueError(f"Pillow finds {image.size}, expected {size}")
    if extension == "jpg":
        header = parse_header(data)
        if (damage := find_damage(data, header)) or not header.has_end:
            raise ValueError(f"libjpeg-turbo: {damage or 'no end'}")


def main() -> int:
    """Returns 1 if something went wrong."""
    count, seed = int(sys.argv[1]), int((sys.argv + ["0"])[2])
    found = list(problems(count, seed))
    print(*found[:50], f"{len(found)} problems in {count} damaged JPEGs, seed {seed}", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
