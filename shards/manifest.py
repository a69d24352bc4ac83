"""``manifest.json``: what a set of shards is, without time, host or absolute path."""

import json
import operator
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
            stored["class_names"] = tuple(stored["class_names"])
            manifest = cls(**stored)
            manifest._check()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ShardError(f"{path} is damaged: {error}") from None
        return manifest

    def _check(self) -> None:
        """Raises ValueError or TypeError where a field is not what it says; names stay inside the folder."""
        total = 0
        for shard in self.shards:
            if Path(shard.name).name != shard.name:
                raise ValueError(f"'{shard.name}' is no file name")
            if min(operator.index(shard.bytes), operator.index(shard.num_samples)) < 0:
                raise ValueError(f"{shard.name} has a negative size")
            total += shard.num_samples
        if total != operator.index(self.num_samples):
            raise ValueError(f"shards hold {total} samples, and num_samples is {self.num_samples}")
        if self.format not in FORMATS or self.labels not in LABEL_KINDS:
            raise ValueError(f"format '{self.format}' or labels '{self.labels}' is unknown")
        if Path(self.base).is_absolute():
            raise ValueError(f"base '{self.base}' is not relative")
        if not isinstance(self.index.get("columns"), Mapping):
            raise TypeError("index has no columns")
