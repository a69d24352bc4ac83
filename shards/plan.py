"""Which sample goes where: a seeded global shuffle, cut into shards by source bytes."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def shuffled(num_samples: int, seed: int) -> NDArray[np.int64]:
    """Returns a permutation of ``range(num_samples)``: the order by a 64-bit hash of (seed, sample).

    numpy's generators may change between versions; this may not (splitmix64's finaliser, Steele et al. 2014).
    """
    with np.errstate(over="ignore"):
        start = _mixed(np.array([seed], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        hashes = _mixed(start + np.arange(1, num_samples + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return np.argsort(hashes, kind="stable").astype(np.int64)


def in_order(num_samples: int) -> NDArray[np.int64]:
    """Returns the source's own order."""
    return np.arange(num_samples, dtype=np.int64)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def cut(sizes: NDArray[np.int64], shard_bytes: int) -> NDArray[np.int64]:
    """Returns where shards start and end, ``shard + 1``, so that each holds about ``shard_bytes`` of the source.

    Args:
        sizes: bytes of each sample in the source, in the shuffled order.
        shard_bytes: bytes per shard; the set is divided evenly, so none is a small rest.
    """
    ends = np.cumsum(sizes)
    num_shards = max(1, min(len(sizes), round(int(ends[-1]) / shard_bytes)))
    each, rest = divmod(int(ends[-1]), num_shards)
    numbers = np.arange(1, num_shards)
    targets = each * numbers + rest * numbers // num_shards  # of all × number // shards, which would overflow
    inner = np.searchsorted(ends, targets, side="left") + 1
    return np.unique(np.concatenate([[0], inner, [len(sizes)]])).astype(np.int64)


def cut_by_count(num_samples: int, shard_samples: int) -> NDArray[np.int64]:
    """Returns where shards start and end, ``shard + 1``, so that each holds ``shard_samples``, the last maybe fewer."""
    return np.append(np.arange(0, num_samples, shard_samples, dtype=np.int64), num_samples)


def recipe_of(listing_digest: str, settings: Mapping[str, Any]) -> str:
    """Returns a SHA-256 of everything that the shards' bytes depend on."""
    text = json.dumps({"listing": listing_digest, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
