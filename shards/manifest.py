"""``manifest.json``: what a set of shards is, without time, host or absolute path."""

import json
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maestri.shards.errors import ShardError
from maestri.shards.files import write_atomically

FORMAT = "maestri-shards"
FORMAT_VERSION = 1
FILE_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One shard."""

    name: str
    """File name in the set's folder."""
    bytes: int
    """Size of the file."""
    num_samples: int
    """Samples in it."""
    sha256: str
    """Of the whole file, hexadecimal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A set of shards."""

    source: Mapping[str, str]
    """``kind`` of the source and its ``name``, the last part of its path."""
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
    """``sha256`` and size of the index, and its columns: name, dtype, byte offset and length."""
    recipe: str
    """SHA-256 of everything that the shards' bytes depend on: source listing and settings."""

    def write(self, folder: Path) -> None:
        """Writes it into a folder, atomically."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        text = json.dumps(head | asdict(self), indent=1) + "\n"
        write_atomically(folder / FILE_NAME, text.encode())

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
        if not isinstance(stored, dict) or stored.pop("format", None) != FORMAT:
            raise ShardError(f"{path} is not the manifest of a set of shards")
        version = stored.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ShardError(f"{path} has format version {version}; this Maestri reads version {FORMAT_VERSION}")
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
        if not isinstance(self.index.get("columns"), Mapping):
            raise TypeError("index has no columns")
