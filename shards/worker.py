"""What a worker process does: one shard, from the source to a finished file."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from maestri.shards.files import sha256_of, sync, write_atomically
from maestri.shards.images import BadImage, store
from maestri.shards.sources import Source
from maestri.shards.tar_shard import Sample, write_dali_index, write_tar

JOURNAL = ".convert"
REPORT_EVERY = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One shard's work."""

    name: str
    """The shard's name without extension."""
    samples: NDArray[np.int64]
    """Samples of the source, in the shard's order."""
    keys: tuple[str, ...]
    """Their keys."""
    labels: NDArray[np.int32]
    """Their labels."""
    sizes: NDArray[np.int64]
    """Their bytes in the source."""


_state: dict[str, Any] = {}


def start(source: Source, out: Path, check: Literal["decode", "header"], counters: Any) -> None:
    """Prepares a worker process.

    Args:
        source: listed already.
        out: the set's folder.
        check: how images are checked.
        counters: shared array of doubles: images, source bytes, bad images.
    """
    _state.update(source=source, out=out, check=check, counters=counters)


def run(task: Task) -> str:
    """Writes a shard, its ``.idx`` and its part of the journal; returns its name.

    The tar is renamed into place last, so a shard that is there is finished.
    """
    out: Path = _state["out"]
    journal = out / JOURNAL
    draft = journal / f"{task.name}.tar.tmp"
    bad: list[dict[str, str]] = []
    columns = write_tar(draft, _samples(task, bad))
    sync(draft)
    write_dali_index(draft, out / f"{task.name}.idx")
    with (journal / f"{task.name}.npz.tmp").open("wb") as file:
        np.savez(file, **columns)  # type: ignore[arg-type]  # numpy's stub takes the columns for allow_pickle
    sync(journal / f"{task.name}.npz.tmp")
    (journal / f"{task.name}.npz.tmp").replace(journal / f"{task.name}.npz")
    record = {"bytes": draft.stat().st_size, "sha256": sha256_of(draft), "bad": bad}
    write_atomically(journal / f"{task.name}.json", json.dumps(record).encode())
    draft.replace(out / f"{task.name}.tar")
    sync(out)
    return task.name


def _samples(task: Task, bad: list[dict[str, str]]) -> Iterator[Sample]:
    """Yields the shard's good samples; bad ones are kept aside and listed."""
    source: Source = _state["source"]
    pending = [0, 0, 0]
    for at, sample in enumerate(task.samples.tolist()):
        pending[0] += 1
        pending[1] += int(task.sizes[at])
        data = source.load(sample)
        try:
            image = store(data, check=_state["check"])
        except BadImage as error:
            pending[2] += 1
            kept = _keep_aside(task.keys[at], data if isinstance(data, bytes) else data.tobytes())
            bad.append({"source": source.name(sample), "key": task.keys[at], "reason": str(error), "kept": kept})
        else:
            yield Sample(key=task.keys[at], label=int(task.labels[at]), image=image)
        if pending[0] >= REPORT_EVERY:
            _count(pending)
    _count(pending)


def _keep_aside(key: str, data: bytes) -> str:
    """Stores a rejected image's bytes and returns their path in the set's folder."""
    name = re.sub(r"[^\w%-]", "_", key)
    path = Path("quarantine") / f"{name}.bin"
    target: Path = _state["out"] / path
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(data)
    return path.as_posix()


def _count(pending: list[int]) -> None:
    counters = _state["counters"]
    with counters.get_lock():
        for at, value in enumerate(pending):
            counters[at] += value
    pending[:] = [0, 0, 0]
