"""What a worker process does: one shard, from the source to a finished file."""

import io
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maestri.shards.files import sha256_of, sync, write_atomically
from maestri.shards.images import MAX_PIXELS, BadImage, store
from maestri.shards.sources import Source
from maestri.shards.tar_shard import Sample, write_tar

JOURNAL = ".convert"
"""Folder, in the set's, of what a conversion needs to go on after an interruption."""
QUARANTINE = "quarantine"
"""Folder, in the set's, of rejected images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One shard's work."""

    name: str
    """The shard's name without extension."""
    number: int
    """Its position among all tasks."""
    samples: NDArray[np.int64]
    """Samples of the source, in the shard's order."""
    keys: tuple[str, ...]
    """Their keys."""
    labels: NDArray[np.int32]
    """Their labels."""
    sizes: NDArray[np.int64]
    """Their bytes in the source."""


class Stopped(Exception):
    """The conversion is to stop: the user asked for it, or another worker failed."""


class Counters:
    """What each task has done, in memory shared by processes without locks: a killed worker can hold none."""

    def __init__(self, context: BaseContext, num_tasks: int) -> None:
        """All zero."""
        self._counts = context.RawArray("q", 3 * num_tasks)
        self._stop = context.RawValue("b", 0)

    def add(self, task: int, *, images: int, size: int, bad: int) -> None:
        """Counts; only one process may do a task."""
        for at, value in enumerate((images, size, bad)):
            self._counts[3 * task + at] += value

    def totals(self) -> tuple[int, int, int]:
        """Returns images, bytes and bad images of all tasks."""
        counts = np.frombuffer(self._counts, np.int64).reshape(-1, 3).sum(0)
        return int(counts[0]), int(counts[1]), int(counts[2])

    def stop(self) -> None:
        """Asks all workers to stop."""
        self._stop.value = 1

    @property
    def is_stopped(self) -> bool:
        """Whether workers are to stop."""
        return bool(self._stop.value)


_state: dict[str, Any] = {}


def start(source: Source, out: Path, check: Literal["decode", "header"], counters: Counters) -> None:
    """Prepares a worker process.

    Args:
        source: listed already.
        out: the set's folder.
        check: how images are checked.
        counters: where to tell progress, and to look whether to stop.
    """
    _state.update(source=source, out=out, check=check, counters=counters)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent tells when to stop
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above, and refuses twice as many
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A killed parent would leave workers waiting for tasks for ever.
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def run(task: Task) -> str:
    """Writes a shard, its ``.idx`` and its part of the journal; returns its name.

    The tar is renamed into place last, so a shard that is there is finished.

    Raises:
        Stopped: the conversion is to stop.
        OSError: the source or the disk failed; nothing half-written is left.
    """
    out: Path = _state["out"]
    journal = out / JOURNAL
    draft = journal / f"{task.name}.tar.{os.getpid()}.tmp"
    bad: list[dict[str, str]] = []
    try:
        written = write_tar(draft, _samples(task, bad))
        sync(draft)
        write_atomically(out / f"{task.name}.idx", written.dali_index.encode())
        buffer = io.BytesIO()
        np.savez(buffer, **written.columns)  # type: ignore[arg-type]  # numpy's stub takes the columns for allow_pickle
        write_atomically(journal / f"{task.name}.npz", buffer.getvalue())
        record = {"bytes": draft.stat().st_size, "sha256": sha256_of(draft), "bad": bad}
        write_atomically(journal / f"{task.name}.json", json.dumps(record).encode())
        draft.replace(out / f"{task.name}.tar")
    finally:
        draft.unlink(missing_ok=True)
    sync(out)
    return task.name


def _samples(task: Task, bad: list[dict[str, str]]) -> Iterator[Sample]:
    """Yields the shard's good samples; bad ones are kept aside and listed."""
    source: Source = _state["source"]
    counters: Counters = _state["counters"]
    counted = 0
    for at, sample in enumerate(task.samples.tolist()):
        if counters.is_stopped:
            raise Stopped
        data = source.load(sample)
        try:
            image = store(data, check=_state["check"])
        except BadImage as error:
            kept = _keep_aside(sample, data if isinstance(data, bytes) else data.tobytes())
            bad.append({"source": source.name(sample), "key": task.keys[at], "reason": str(error), "kept": kept})
        else:
            yield Sample(key=task.keys[at], label=int(task.labels[at]), image=image)
        counters.add(task.number, images=1, size=int(task.sizes[at]), bad=len(bad) - counted)
        counted = len(bad)


def _keep_aside(sample: int, data: bytes) -> str:
    """Stores a rejected image's bytes and returns their path in the set's folder."""
    path = Path(QUARANTINE) / f"{sample:09d}.bin"
    target: Path = _state["out"] / path
    target.parent.mkdir(exist_ok=True)
    write_atomically(target, data)
    return path.as_posix()
