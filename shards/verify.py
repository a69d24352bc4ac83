"""Whether a set's bytes are still those that were stored."""

from collections.abc import Iterator

import numpy as np

from maestri.shards.errors import ShardCorrupt
from maestri.shards.files import sha256_of
from maestri.shards.index import FILE_NAME
from maestri.shards.shard_set import ShardSet

CHUNK = 256


def damage(shard_set: ShardSet) -> Iterator[str]:
    """Yields a line for each thing that is wrong: index, shard or sample, by name.  Reads every byte."""
    if sha256_of(shard_set.folder / FILE_NAME) != shard_set.manifest.index["sha256"]:
        yield f"{shard_set.folder / FILE_NAME}: its SHA-256 is not the manifest's"
    for number, shard in enumerate(shard_set.manifest.shards):
        if sha256_of(shard_set.folder / shard.name) == shard.sha256:
            continue
        found = list(_damaged_samples(shard_set, number))
        yield from found
        if not found:
            yield f"{shard_set.folder / shard.name}: its SHA-256 is not the manifest's, but its images are whole"


def _damaged_samples(shard_set: ShardSet, shard: int) -> Iterator[str]:
    rows = np.flatnonzero(shard_set.columns.shard == shard).astype(np.int64)
    for start in range(0, len(rows), CHUNK):
        for row in rows[start : start + CHUNK]:
            try:
                shard_set.read_checked(np.array([row]))
            except ShardCorrupt as error:
                yield str(error)
