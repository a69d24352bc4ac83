"""One shard as a plain WebDataset tar, written through webdataset, with DALI's ``.idx`` beside it."""

import os
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestri.shards.images import StoredImage

IMAGE, LABEL = "jpg", "cls"
DALI_INDEX_VERSION = "v1.2"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sample to write."""

    key: str
    """Without dots."""
    label: int
    """−1 for none; then no ``.cls`` member is written."""
    image: StoredImage
    """The image."""


def write_tar(path: Path, samples: Iterable[Sample]) -> dict[str, NDArray[Any]]:
    """Writes a tar and returns its rows of the index, by column; nothing is synced.

    Bytes depend on the samples alone: modification time, user and group are 0.
    """
    import webdataset  # type: ignore[import-untyped]

    rows: list[tuple[int, ...]] = []
    keys: list[bytes] = []
    with path.open("wb") as file:
        writer = webdataset.TarWriter(file, user="", group="", mtime=0, encoder=False)
        for sample in samples:
            record: dict[str, Any] = {"__key__": sample.key, IMAGE: sample.image.data}
            if sample.label >= 0:
                record[LABEL] = str(sample.label).encode()
            writer.write(record)
            # The image is the last member ("cls" sorts before "jpg"), padded to whole blocks.
            padded = -(-len(sample.image.data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            image = sample.image
            rows.append((
                writer.tarstream.offset - padded, len(image.data), image.width, image.height, image.orientation,
                image.stored, sample.label, zlib.crc32(image.data),
            ))  # fmt: skip
            keys.append(sample.key.encode())
        writer.close()
    names = ("offset", "bytes", "width", "height", "orientation", "stored", "label", "crc32")
    table = np.array(rows, np.int64).reshape(-1, len(names))
    columns: dict[str, NDArray[Any]] = {name: table[:, at] for at, name in enumerate(names)}
    columns["key_bytes"] = np.array([len(key) for key in keys], np.int64)
    columns["keys"] = np.frombuffer(b"".join(keys), np.uint8)
    return columns


def write_dali_index(tar: Path, path: Path) -> None:
    """Writes DALI's index of a tar: per sample, extension, offset, size and name of each member.

    The format is that of DALI's ``wds2idx`` 1.2; ``fn.readers.webdataset`` reads it.
    """
    groups: list[tuple[str, list[str]]] = []
    with tarfile.open(tar, "r:") as archive:
        for member in archive:
            stem, _, extension = member.name.partition(".")
            if not groups or groups[-1][0] != stem:
                groups.append((stem, []))
            groups[-1][1].append(f"{extension} {member.offset_data} {member.size} {_quoted(member.name)}")
    lines = [f"{DALI_INDEX_VERSION} {len(groups)}", *(" ".join(parts) for _, parts in groups)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _sync(path)


def _quoted(name: str) -> str:
    """Returns a name as one word: DALI splits lines at blanks."""
    return name.replace(" ", "_")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
