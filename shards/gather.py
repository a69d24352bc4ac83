"""Index and manifest of shards that are there already, from what was found in them."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from maestri.shards import index
from maestri.shards.errors import ShardError
from maestri.shards.files import sync, write_atomically, xxh128_of
from maestri.shards.finish import QUARANTINE_LIST
from maestri.shards.manifest import Manifest, ShardInfo
from maestri.shards.scan import Scanned
from maestri.shards.sources.labels import LabelColumns, Labels

_DRAFT = ".index.tmp"


def labels_of(shards: Sequence[Scanned], class_names: tuple[str, ...] = ()) -> LabelColumns:
    """Returns the labels of all rows.

    Args:
        shards: what was found.
        class_names: by number, where they are known.

    Raises:
        ShardError: they don't fit together, or a class is not among those given.
    """
    gathered = Labels(class_names)
    for shard in shards:
        for key, label in zip(shard.keys, shard.labels, strict=True):
            gathered.add(label, f"{shard.path.name}:{key}")
    found = gathered.columns()
    if not class_names or (found.labels >= 0).any() or found.label_ends is not None:
        return found
    return LabelColumns(labels=found.labels, label_ends=None, label_values=None, class_names=())


def write_index(folder: Path, shards: Sequence[Scanned], labels: LabelColumns, *, wanted: str = "") -> dict[str, Any]:
    """Writes ``index.bin`` of shards with at least one row and returns the manifest's description of it.

    Args:
        folder: of the set.
        shards: in the order of rows.
        labels: of all rows.
        wanted: its checksum; with another one, the index that is there stays.
    """
    num_labels = None if labels.label_values is None else len(labels.label_values)
    num_rows = sum(len(shard) for shard in shards)
    layout = index.layout_of(
        num_rows, key_bytes=sum(len(shard.columns["keys"]) for shard in shards), num_labels=num_labels
    )
    path = folder / _DRAFT
    try:
        draft = index.IndexDraft(path, num_rows, layout)
        try:
            first = 0
            for number, shard in enumerate(shards):
                draft.add(_with_labels(shard, number, first, labels))
                first += len(shard)
        finally:
            draft.close()
        sync(path)
        described = {"bytes": path.stat().st_size, "xxh128": xxh128_of(path), "columns": layout}
        if wanted in ("", described["xxh128"]):
            path.replace(folder / index.FILE_NAME)
            sync(folder)
    finally:
        path.unlink(missing_ok=True)
    return described


def write_set(
    folder: Path,
    shards: Sequence[Scanned],
    labels: LabelColumns,
    *,
    quarantined: Sequence[Mapping[str, str]],
    fields: Mapping[str, Any],
) -> Manifest:
    """Writes everything of a set but its shards, the manifest last.

    Args:
        folder: of the set.
        shards: in the order of rows; those without a row are left out.
        labels: of all rows.
        quarantined: entries of ``quarantine.jsonl``.
        fields: of the manifest: ``source``, ``images``, ``seed``, ``base`` and ``recipe``.
    """
    kept = [shard for shard in shards if len(shard)]
    for shard in kept:
        if shard.dali_index is not None:
            write_if_other((folder / shard.path.name).with_suffix(".idx"), shard.dali_index.encode())
    listed = "".join(json.dumps(entry) + "\n" for entry in quarantined)
    write_if_other(folder / QUARANTINE_LIST, listed.encode())
    manifest = Manifest(
        **fields,
        format="beton" if kept[0].path.suffix == ".beton" else "tar",
        labels="several" if labels.label_ends is not None else "class" if labels.class_names else "none",
        class_names=labels.class_names,
        num_samples=sum(len(shard) for shard in kept),
        num_quarantined=len(quarantined),
        shards=tuple(
            ShardInfo(name=shard.path.name, bytes=shard.bytes, num_samples=len(shard), xxh128=shard.xxh128)
            for shard in kept
        ),
        index=write_index(folder, kept, labels),
    )
    manifest.write(folder)
    return manifest


def write_if_other(path: Path, content: bytes) -> None:
    """Writes a file, unless it is like that already."""
    if not path.is_file() or path.stat().st_size != len(content) or path.read_bytes() != content:
        write_atomically(path, content)


def recipe_from(shards: Sequence[Scanned], settings: Mapping[str, Any]) -> str:
    """Returns a SHA-256 of what a set made of existing shards depends on: their bytes, and settings."""
    state = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for shard in shards:
        state.update(f"{shard.path.name}\0{shard.xxh128}\0".encode("utf-8", "surrogateescape"))
    return state.hexdigest()


def require_writable(folder: Path) -> None:
    """Raises ShardError where a folder cannot be written to."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ShardError(f"{folder} cannot be written to; give another folder for the set: OUT")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing to a set.

    Raises:
        ShardError: one is at it.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"another process is writing to {folder}; wait for it, or stop it") from None
        yield
    finally:
        os.close(lock)


def _with_labels(shard: Scanned, number: int, first: int, labels: LabelColumns) -> dict[str, Any]:
    """Returns a shard's columns with its own slice of all labels."""
    last = first + len(shard)
    columns = dict(shard.columns)
    columns["shard"] = np.full(len(shard), number, np.int64)
    columns["label"] = labels.labels[first:last]
    if labels.label_ends is not None and labels.label_values is not None:
        ends = labels.label_ends[first:last]
        start = int(labels.label_ends[first - 1]) if first else 0
        columns["num_labels"] = np.diff(ends, prepend=start)
        columns["label_values"] = labels.label_values[start : int(ends[-1])]
    return columns
