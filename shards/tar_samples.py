"""Samples of a WebDataset tar, whoever made it: members that share a name up to the first dot."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maestri.shards.keys import escaped
from maestri.shards.sources.image_folder import IMAGE_SUFFIXES
from maestri.shards.sources.tar_index import tar_members
from maestri.shards.sources.tar_labels import label_among
from maestri.shards.tar_shard import DALI_INDEX_VERSION

_FIRST = ("jpg", "jpeg")
Part = tuple[str, int, int, str]
"""Extension, where the content starts in the tar, its size, the member's whole name."""


@dataclass(frozen=True, slots=True)
class Group:
    """Members that stand together and share a name up to the first dot of its last part."""

    stem: str
    """The name they share."""
    parts: list[Part]
    """In the tar's order."""

    def image(self, extension: str = "") -> Part | None:
        """Returns the member with the image: the one with this extension, or the most likely one."""
        if extension:
            return self.part(extension)
        found = [part for part in self.parts if f".{part[0].lower()}" in IMAGE_SUFFIXES]
        return min(found, key=lambda part: part[0].lower() not in _FIRST, default=None)

    def part(self, extension: str) -> Part | None:
        """Returns the member with an extension, in whatever case."""
        return next((part for part in self.parts if part[0].lower() == extension.lower()), None)


def groups_of(path: Path) -> list[Group]:
    """Returns the samples of a tar as webdataset sees them.

    Raises:
        ShardError: the tar is damaged or no plain one.
        OSError: it cannot be read.
    """
    groups: list[Group] = []
    for name, offset, size in tar_members(path):
        dot = name.find(".", name.rfind("/") + 1)
        stem, extension = (name[:dot], name[dot + 1 :]) if dot >= 0 else (name[:-1], name)  # as wds2idx does
        if not stem or stem.endswith("/"):
            continue  # a hidden file
        if not groups or groups[-1].stem != stem:
            groups.append(Group(stem, []))
        groups[-1].parts.append((extension, offset, size, name))
    return groups


def key_of(stem: str) -> str:
    """Returns a key; names that convert made are keys already."""
    stem = stem.removeprefix("./").lstrip("/") or stem
    bare = stem.replace("%", "")
    return stem if escaped(bare) == bare else escaped(stem)


def label_of(path: Path, handle: int, group: Group, name: str = "") -> Any:
    """Returns what a sample says about its classes: a number, a name, a list of these, or None.

    Args:
        path: of the tar.
        handle: of the tar, open.
        group: the sample.
        name: of the label's member or JSON key, as ``label_among`` takes it.

    Raises:
        ShardError: the member holds something else.
    """
    sizes = {extension.lower(): (offset, size) for extension, offset, size, _ in reversed(group.parts)}

    def read(extension: str) -> bytes:
        offset, size = sizes[extension]
        return os.pread(handle, size, offset)

    where = f"{path.name}:{group.stem}"
    return label_among({extension: size for extension, (_, size) in sizes.items()}, read, name, where)[0]


def dali_index_of(groups: Iterable[Group]) -> str | None:
    """Returns DALI's index, as its ``wds2idx`` 1.2 writes it; None where a name or extension breaks the format."""
    lines = []
    for group in groups:
        for extension, _, _, name in group.parts:
            if not extension or extension.split() != [extension] or name.split() != [name] or not _is_utf8(name):
                return None
        lines.append(" ".join(f"{extension} {at} {size} {name}" for extension, at, size, name in group.parts))
    return "\n".join([f"{DALI_INDEX_VERSION} {len(lines)}", *lines]) + "\n"


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)
