"""Whether a set's bytes are still those that were stored."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from maestri.shards.errors import ShardCorrupt
from maestri.shards.files import sha256_of
from maestri.shards.index import FILE_NAME
from maestri.shards.shard_set import ShardSet
from maestri.shards.tar_shard import dali_index


def damage(shard_set: ShardSet) -> Iterator[str]:
    """Yields a line for each thing that is wrong: index, shard or sample, by name.  Reads every byte."""
    if sha256_of(shard_set.folder / FILE_NAME) != shard_set.manifest.index["sha256"]:
        yield f"{shard_set.folder / FILE_NAME}: its SHA-256 is not the manifest's"
    for number, shard in enumerate(shard_set.manifest.shards):
        yield from _damaged_dali_index(shard_set.folder / shard.name)
        if sha256_of(shard_set.folder / shard.name) == shard.sha256:
            continue
        found = list(_damaged_samples(shard_set, number))
        yield from found
        if not found:
            yield f"{shard_set.folder / shard.name}: its SHA-256 is not the manifest's, but its images are whole"


def _damaged_dali_index(tar: Path) -> Iterator[str]:
    path = tar.with_suffix(".idx")
    try:
        if path.read_text(encoding="utf-8") != dali_index(tar):
            yield f"{path}: not the index of {tar.name}"
    except (OSError, UnicodeDecodeError, tarfile.TarError) as error:
        yield f"{path}: cannot be compared with {tar.name}: {error}"


def _damaged_samples(shard_set: ShardSet, shard: int) -> Iterator[str]:
    rows = np.flatnonzero(shard_set.columns.shard == shard).astype(np.int64)
    for row in rows:
        try:
            shard_set.read_checked(np.array([row]))
        except ShardCorrupt as error:
            yield str(error)
