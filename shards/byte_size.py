"""Sizes as people write them."""

import re
from typing import Annotated

import tyro

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_bytes(text: str) -> int:
    """Returns bytes from ``268435456``, ``500MB``, ``1.5G`` or ``256MiB``.

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"'{text}' is no size; expected bytes, or something like 500MB or 256MiB")
    return round(float(match[1]) * _UNITS[match[2]]) if "." in match[1] else int(match[1]) * _UNITS[match[2]]


ByteSize = Annotated[
    int, tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar="BYTES", instance_from_str=lambda words: parse_bytes(words[0]),
        is_instance=lambda value: isinstance(value, int), str_from_instance=lambda value: [_written(value)],
    ),
]  # fmt: skip
"""A number of bytes, in a command line also with a unit."""


def _written(size: int) -> str:
    """Returns a size with the largest unit that divides it."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)
