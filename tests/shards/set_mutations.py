"""Sets with a damaged manifest or index."""

import contextlib
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from maestri.shards.commands.inspect import inspect
from maestri.shards.errors import ShardError
from maestri.shards.index import FILE_NAME as INDEX
from maestri.shards.manifest import FILE_NAME as MANIFEST
from maestri.shards.shard_set import ShardSet
from maestri.shards.sources.shard_set import ShardSetSource
from maestri.shards.stats import stats

HEAD_BYTES = 64
ODD_VALUES = (
    None, -1, 0, 2**31, 2**63, 2**64, 1e300, float("inf"), float("nan"), 1.5, "", "..", "../x", "/etc/passwd", "a\0b",
    "\ud800", "ab", [], {}, [[]], [1, 2], ["a"], {"a": 1}, {"a": "b"}, True, "tar",
)  # fmt: skip


def mutated_bytes(data: bytes, dice: random.Random, first: int = 0) -> bytes:
    """Returns bytes with a part flipped, overwritten, cut off, doubled or taken out, not before ``first``."""
    at = dice.randrange(first, max(len(data), first + 1))
    size = min(dice.choice((1, 1, 2, 4, 8, 64, 512)), len(data) - at)
    kind = dice.randrange(5)
    if kind == 0:
        return data[:at] + bytes(byte ^ (1 << dice.randrange(8)) for byte in data[at : at + size]) + data[at + size :]
    if kind == 1:
        return data[:at] + dice.choice((b"\0", b"\xff", b"\x7f")) * size + data[at + size :]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + data[at : at + size] + data[at:]
    return data[:at] + data[at + size :]


def mutated_manifest(text: bytes, dice: random.Random) -> bytes:
    """Returns a manifest that is JSON still, with a value replaced, moved or removed."""
    stored = json.loads(text)
    node, path = stored, []
    while isinstance(node, dict | list) and node and (not path or dice.random() < 0.7):
        key = dice.choice(list(node) if isinstance(node, dict) else list(range(len(node))))
        path.append((node, key))
        node = node[key]
    parent, key = path[-1]
    kind = dice.randrange(4)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent[key], int):
        parent[key] += dice.choice((-1, 1, 64, -64, 4096, 2**32))
    else:
        parent[key] = dice.choice(ODD_VALUES)
    return json.dumps(stored).encode()


def places_of(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yields where each value of a manifest stands, as container and key; of a list, only its ends."""
    keys = list(node) if isinstance(node, dict) else sorted({0, len(node) - 1}) if node else []
    for key in keys:
        yield node, key
        if isinstance(node[key], dict | list):
            yield from places_of(node[key])


def swapped_manifest(text: bytes, dice: random.Random) -> bytes:
    """Returns a manifest in which a value, anywhere in it, is of another kind or has lost its ends."""
    stored = json.loads(text)
    parent, key = dice.choice(list(places_of(stored)))
    value = parent[key]
    if isinstance(value, dict | list | str) and dice.random() < 0.2:
        parent[key] = dict(list(value.items())[1:]) if isinstance(value, dict) else value[:-1]
    else:
        parent[key] = dice.choice([odd for odd in ODD_VALUES if type(odd) is not type(value)])
    return json.dumps(stored).encode()


def show(folder: Path) -> str:
    """Runs what people look at a set with; returns an error that is none of one line."""
    for action in (
        lambda: inspect(folder, rows=5, as_json=True),
        lambda: inspect(folder, rows=5),
        lambda: _stats(folder),
        lambda: ShardSetSource(folder).listing().take(np.arange(2)),
    ):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                action()
        except ShardError as error:
            if "\n" in str(error):
                return f"an error of several lines: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def _stats(folder: Path) -> None:
    with ShardSet.open(folder) as shard_set:
        json.dumps(stats(shard_set))


def problem_with(folder: Path, images: set[bytes]) -> str:
    """Returns what is wrong with how a set is taken: it must be refused clearly, or give images stored in it."""
    try:
        with ShardSet.open(folder) as shard_set:
            for row in range(min(len(shard_set), 100)):
                try:
                    data = shard_set.read_checked(np.array([row]))[0]
                except ShardError as error:
                    if "\n" in str(error):
                        return f"an error of several lines: {error}"
                else:
                    if data and data not in images:
                        return f"row {row} gives {len(data)} bytes that were never stored"
                shard_set.key(row)
                shard_set.label(np.array([row]))
                with contextlib.suppress(ShardError):
                    shard_set.labels_of(row)
    except ShardError as error:
        return f"an error of several lines: {error}" if "\n" in str(error) else ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def problems(whole: Path, count: int, seed: int = 0) -> Iterator[str]:
    """Yields each damage of ``count`` that was not taken as it should.

    Args:
        whole: a set in a folder that may be written to.
        count: damages to try; half of them leave JSON, or the index's head, as it should be.
        seed: of the damages.
    """
    dice = random.Random(seed)
    kept = {name: (whole / name).read_bytes() for name in (MANIFEST, INDEX)}
    with ShardSet.open(whole) as shard_set:
        images = set(shard_set.read(np.arange(len(shard_set))))
    for number in range(count):
        name = (MANIFEST, INDEX)[number % 2]
        if number % 4 == 0:
            data = dice.choice((mutated_manifest, swapped_manifest))(kept[name], dice)
        else:
            data = mutated_bytes(kept[name], dice, first=HEAD_BYTES if number % 4 == 1 else 0)
        (whole / name).write_bytes(data)
        if problem := problem_with(whole, images) or show(whole):
            yield f"damage {number} of {name}, seed {seed}: {problem}"
        (whole / name).write_bytes(kept[name])
