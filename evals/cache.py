"""Features kept on disk, so that images are decoded and encoded once for all protocols.

``FOLDER/<digest>/`` holds one model's features of one set of images::

    entry.json       what they are of, in words, and each file's shape, dtype and XXH3 checksum (128 bits)
    <pooling>.npy    ``sample dim``

The digest is of what they are of.  An entry is written as ``.<digest>.tmp``, synced and renamed, so it is whole or not
there; before it is used its description and every checksum are compared.
"""

import fcntl
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from numpy.typing import NDArray

from maestri.evals.features import ImageSettings, Judged, Table, extract_features
from maestri.evals.sharing import agreeing, place
from maestri.pipelines.executor import choose_executor
from maestri.pipelines.selection import identity
from maestri.shards.files import sync, xxh128_of
from maestri.shards.shard_set import ShardSet

ENTRY = "entry.json"
VERSION = 1
"""Raised when features of the same images and weights come out otherwise."""

_logger = logging.getLogger(__name__)

Description = Mapping[str, Any]
"""What features are of: plain values by name, as JSON stores them."""


class FeatureCache:
    """Entries in a folder, which is made when the first is written."""

    def __init__(self, folder: Path) -> None:
        """Names the folder."""
        self.folder = folder

    def load(self, description: Description) -> Table | None:
        """Returns the features of a description, memory-mapped; None where they are not there or damaged, with a note.

        Pages of the map that are written to are this process's own; the file never changes.
        """
        path = self.path_of(description)
        if not path.is_dir():
            return None
        try:
            return _read(path, description)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _logger.warning("%s is not used, its features are computed again: %s", path, error)
            return None

    def save(self, description: Description, table: Table) -> None:
        """Writes an entry, over the one that is there.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        final = self.path_of(description)
        draft = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            files = {}
            for pooling, values in table.items():
                path = draft / f"{pooling}.npy"
                np.save(path, values.cpu().numpy())
                sync(path)
                kind = str(values.dtype).removeprefix("torch.")
                files[pooling] = {"shape": list(values.shape), "dtype": kind, "xxh128": xxh128_of(path)}
            content = json.dumps({"of": dict(description), "files": files}, indent=1) + "\n"
            (draft / ENTRY).write_text(content, encoding="utf-8")
            sync(draft / ENTRY)
            sync(draft)
            shutil.rmtree(final, ignore_errors=True)
            draft.rename(final)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        sync(self.folder)

    def path_of(self, description: Description) -> Path:
        """Returns the folder of an entry."""
        text = json.dumps({"version": VERSION, **description}, sort_keys=True)
        return self.folder / xxhash.xxh3_128_hexdigest(text.encode())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other evaluations out of the folder meanwhile; the lock of a killed one is free.

        Raises:
            OSError: the folder cannot be written to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _logger.warning("another evaluation is writing to %s; waiting for it", self.folder)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def cached_features(
    models: Mapping[str, Judged],
    shard_set: ShardSet,
    rows: NDArray[np.int64],
    settings: ImageSettings,
    cache: FeatureCache | None,
) -> dict[str, Table]:
    """Returns features on the CPU, those that the cache lacks computed and put there; every rank must call it.

    Rank 0 alone writes, and decides what is read: the folder must be the same one for all ranks.

    Args:
        models: whose features.
        shard_set: the images.
        rows: which of them.
        settings: how they are made.
        cache: None computes everything, and writes nothing.
    """
    rank, world = place()
    descriptions = {name: _describe(model, shard_set, rows, settings) for name, model in models.items()}
    tables: dict[str, Table] = {}
    with ExitStack() as stack:
        if cache is not None:
            with agreeing():
                if rank == 0:
                    stack.enter_context(cache.locked())
                    tables = _loaded(cache, descriptions)
            names = [list(tables)]
            if world > 1:
                dist.broadcast_object_list(names)
            with agreeing():
                if rank:
                    tables = _loaded(cache, {name: descriptions[name] for name in names[0]})
                    if list(tables) != names[0]:
                        raise ValueError(f"this rank does not see the features that rank 0 sees in {cache.folder}")
        missing = {name: model.extract for name, model in models.items() if name not in tables}
        what = f"{len(rows):,} images of {shard_set.folder}"
        if tables and cache is not None:
            _logger.info("%s: features of %s come from %s", what, ", ".join(tables), cache.folder)
        if missing:
            _logger.info("%s: computing features of %s", what, ", ".join(missing))
            start = time.monotonic()
            computed = extract_features(missing, shard_set, rows, settings)
            seconds = time.monotonic() - start
            kept = f", kept in {cache.folder}" if cache is not None else ""
            _logger.info("%s: done in %.1f s (%.0f images/s)%s", what, seconds, len(rows) / seconds, kept)
            for name, table in computed.items():
                tables[name] = {pooling: values.cpu() for pooling, values in table.items()}
        with agreeing():
            if cache is not None and rank == 0:
                for name in missing:
                    cache.save(descriptions[name], tables[name])
    return {name: tables[name] for name in models}


def _loaded(cache: FeatureCache, descriptions: Mapping[str, Description]) -> dict[str, Table]:
    """Returns the features that the cache holds."""
    found = {name: cache.load(description) for name, description in descriptions.items()}
    return {name: table for name, table in found.items() if table is not None}


def _describe(model: Judged, shard_set: ShardSet, rows: NDArray[np.int64], settings: ImageSettings) -> dict[str, Any]:
    """Returns everything that features depend on."""
    manifest = shard_set.manifest
    return {
        "model": dict(model.identity),
        "shards": {"recipe": manifest.recipe, "index": manifest.index["xxh128"]},
        "rows": {"count": len(rows), "xxh3": identity(rows)},
        "images": {
            "size": settings.size,
            "crop_fraction": settings.crop_fraction,
            "executor": choose_executor(settings.executor, settings.device),
        },
        "precision": str(settings.dtype).removeprefix("torch."),
    }


def _read(path: Path, description: Description) -> Table:
    """Returns a checked entry.

    Raises:
        ValueError: it is damaged or of something else; OSError, KeyError and others are the same news.
    """
    entry = json.loads((path / ENTRY).read_text(encoding="utf-8"))
    if entry["of"] != dict(description):
        raise ValueError(f"{ENTRY} is of other features")
    table = {}
    for pooling, expected in entry["files"].items():
        file = path / f"{pooling}.npy"
        if xxh128_of(file) != expected["xxh128"]:
            raise ValueError(f"the checksum of {file.name} is wrong")
        values = torch.from_numpy(np.load(file, mmap_mode="c"))  # "r" would be read-only, which torch has no word for
        if [list(values.shape), str(values.dtype)] != [expected["shape"], f"torch.{expected['dtype']}"]:
            raise ValueError(f"{file.name} holds {values.dtype}, {list(values.shape)}, expected {expected}")
        table[pooling] = values
    if not table:
        raise ValueError(f"{ENTRY} names no file")
    return table
