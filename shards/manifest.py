"""``manifest.json``: what a set of shards is, without time, host or absolute path."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from maestri.shards.errors import ShardError
from maestri.shards.files import write_atomically

KIND = "maestri-shards"
FORMAT_VERSION = 2
FILE_NAME = "manifest.json"
FORMATS = ("tar", "beton")
_LAST_LINE = b',\n "xxh128": "%s"\n}\n'
"""Checksum of all bytes before it."""
LABEL_KINDS = ("none", "class", "several")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One shard."""

    name: str
    """File name in the set's folder."""
    bytes: int
    """Size of the file."""
    num_samples: int
    """Samples in it."""
    xxh128: str
    """128-bit XXH3 checksum of the whole file, hexadecimal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A set of shards."""

    source: Mapping[str, str]
    """``kind`` of the source and its ``name``, the last part of its path."""
    format: str
    """Of its shards: ``tar`` or ``beton``."""
    labels: str
    """``none``, ``class``, or ``several`` where an image may have any number of them."""
    class_names: tuple[str, ...]
    """By label; empty where samples have no labels."""
    num_samples: int
    """Rows of the index."""
    num_quarantined: int
    """Images of the source that could not be read and are not in the set."""
    images: Mapping[str, str]
    """What was stored: ``kept`` and ``transcoded`` in words, and ``check``."""
    seed: int
    """Of the shuffle."""
    shards: tuple[ShardInfo, ...]
    """In the order of rows."""
    index: Mapping[str, Any]
    """``xxh128`` and ``bytes`` of the index, and its ``columns``: name, dtype, byte offset and length."""
    recipe: str
    """SHA-256 of everything that the shards' bytes depend on: source listing and settings."""
    base: str = ""
    """Where shards lie that were made by others: a folder, as seen from the set's; empty for the set's own."""

    def write(self, folder: Path) -> None:
        """Writes it into a folder, atomically."""
        head = {"kind": KIND, "format_version": FORMAT_VERSION}
        text = json.dumps(head | asdict(self), indent=1).removesuffix("\n}").encode()
        write_atomically(folder / FILE_NAME, text + _LAST_LINE % xxhash.xxh3_128_hexdigest(text).encode())

    @staticmethod
    def is_as_written(folder: Path) -> bool:
        """Returns whether no byte of the file in a folder was changed since it was written.

        Opening a set does not ask for this, so that class names may be edited by hand.
        """
        content = (folder / FILE_NAME).read_bytes()
        size = len(_LAST_LINE % bytes(32))
        return content[-size:] == _LAST_LINE % xxhash.xxh3_128_hexdigest(content[:-size]).encode()

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads it from a folder.

        Raises:
            ShardError: there is none, it is damaged, or of a newer format.
        """
        path = folder / FILE_NAME
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            hint = " (an unfinished conversion: run the same command again)" if (folder / ".convert").is_dir() else ""
            raise ShardError(f"{folder} is not a set of shards: there is no {FILE_NAME} in it{hint}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ShardError(f"{path} cannot be read: {error}") from None
        if not isinstance(stored, dict) or KIND not in (stored.pop("kind", None), stored.get("format")):
            raise ShardError(f"{path} is not the manifest of a set of shards")
        version = stored.pop("format_version", None)
        stored.pop("xxh128", None)
        if version != FORMAT_VERSION:
            advice = "convert the source again" if version == 1 else "a newer one may"
            raise ShardError(f"{path} has format version {version}; this Maestri reads {FORMAT_VERSION}; {advice}")
        try:
            stored["shards"] = tuple(ShardInfo(**shard) for shard in stored["shards"])
            if not isinstance(stored["class_names"], list):
                raise TypeError("class_names is no list")
            stored["class_names"] = tuple(stored["class_names"])
            manifest = cls(**stored)
            manifest._check()
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ShardError(f"{path} is damaged: {error}") from None
        return manifest

    def _check(self) -> None:
        """Raises ValueError or TypeError where a field is not what it says; names stay inside the folder."""
        total = 0
        for shard in self.shards:
            _check_path("a shard's name", shard.name)
            if Path(shard.name).name != shard.name:
                raise ValueError(f"{shard.name!a} is no file name")
            _check_text(f"xxh128 of {shard.name!a}", shard.xxh128)
            _check_number(f"bytes of {shard.name!a}", shard.bytes)
            _check_number(f"num_samples of {shard.name!a}", shard.num_samples)
            total += shard.num_samples
        _check_number("num_samples", self.num_samples)
        _check_number("num_quarantined", self.num_quarantined)
        _check_number("seed", self.seed, least=-1)
        if total != self.num_samples:
            raise ValueError(f"shards hold {total} samples, and num_samples is {self.num_samples}")
        if self.format not in FORMATS or self.labels not in LABEL_KINDS:
            raise ValueError(f"format {self.format!a} or labels {self.labels!a} is unknown")
        _check_path("base", self.base)
        if Path(self.base).is_absolute():
            raise ValueError(f"base {self.base!a} is not relative")
        for name, fields in (("source", self.source), ("images", self.images)):
            if not isinstance(fields, dict):
                raise TypeError(f"{name} is {fields!a:.60}; expected names and texts")
            for key, text in fields.items():
                _check_text(f"{name}.{key}", text)
        _check_text("recipe", self.recipe)
        for label, text in enumerate(self.class_names):
            _check_text(f"the name of class {label}", text)
        if not isinstance(self.index, dict) or not isinstance(self.index.get("columns"), dict):
            raise TypeError("index has no columns")


def _check_text(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{what} is {value!a:.60}; expected a text")


def _check_path(what: str, value: object) -> None:
    _check_text(what, value)
    if "\0" in str(value):
        raise ValueError(f"{what} is {value!a:.60}, which no path can be")
    os.fsencode(str(value))  # a lone surrogate is no path either


def _check_number(what: str, value: object, *, least: int = 0) -> None:
    if type(value) is not int or not least <= value < 1 << 63:
        raise ValueError(f"{what} is {value!a:.60}; expected a whole number from {least}")
