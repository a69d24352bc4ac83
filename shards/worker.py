"""What a worker process does: one shard, from the source to finished files."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from maestri.shards.ahead import Checks, Piece
from maestri.shards.beton_shard import BetonShard
from maestri.shards.errors import ShardError
from maestri.shards.files import sync, write_atomically
from maestri.shards.images import MAX_PIXELS, BadImage, StoredImage, is_whole_jpeg, store
from maestri.shards.journal import QUARANTINE, Journal
from maestri.shards.listing import Listing
from maestri.shards.rows import Sample
from maestri.shards.sources import Source
from maestri.shards.tar_shard import TarShard


@dataclass(frozen=True, kw_only=True, slots=True)
class Storing:
    """How images are checked and stored."""

    check: Literal["decode", "header"]
    """``decode`` decodes every image once; ``header`` only parses the header."""
    bad: Literal["quarantine", "fail", "fix"]
    """What becomes of an image that fails the check."""
    lossless: bool
    """Keep PNG as it is, and store what else would be transcoded as PNG."""
    resize_shorter: int
    """Pixels that the shorter side is reduced to; 0 for no change."""
    quality: int
    """Of JPEGs that are encoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One shard's work."""

    name: str
    """The shard's name without extension."""
    number: int
    """Its position among all tasks."""
    first_sample: int
    """Its first sample's position in the shuffled source."""
    samples: Listing
    """Its samples, in the shard's order."""


class Stopped(Exception):
    """The conversion is to stop: the user asked for it, or another worker failed."""


class Counters:
    """What each task has done, in memory shared by processes without locks: a killed worker can hold none."""

    def __init__(self, context: BaseContext, num_tasks: int) -> None:
        """All zero."""
        self._counts = context.RawArray("q", 3 * num_tasks)
        self._at = context.RawArray("q", num_tasks)
        self._helped = context.RawArray("b", num_tasks)
        self._stop = context.RawValue("b", 0)

    def add(self, task: int, *, images: int, size: int, bad: int) -> None:
        """Counts; only one process may do a task."""
        for at, value in enumerate((images, size, bad)):
            self._counts[3 * task + at] += value

    def totals(self) -> tuple[int, int, int]:
        """Returns images, bytes and bad images of all tasks."""
        counts = np.frombuffer(self._counts, np.int64).reshape(-1, 3).sum(0)
        return int(counts[0]), int(counts[1]), int(counts[2])

    def enter(self, task: int, sample: int) -> None:
        """Says at which of its samples a task is; -1 for none."""
        self._at[task] = sample + 1

    def at(self, task: int) -> int:
        """Returns at which of its samples a task is; -1 for none."""
        return int(self._at[task]) - 1

    def entered(self) -> list[tuple[int, int]]:
        """Returns tasks that are at a sample, and at which: after a worker's death, one of them was its end."""
        at = np.frombuffer(self._at, np.int64)
        return [(task, int(at[task]) - 1) for task in np.flatnonzero(at).tolist()]

    def help(self, task: int) -> None:
        """Says that other processes check images of a task ahead of it."""
        self._helped[task] = 1

    def is_helped(self, task: int) -> bool:
        """Returns whether other processes check images of a task ahead of it."""
        return bool(self._helped[task])

    def stop(self) -> None:
        """Asks all workers to stop."""
        self._stop.value = 1

    @property
    def is_stopped(self) -> bool:
        """Whether workers are to stop."""
        return bool(self._stop.value)


_state: dict[str, Any] = {}


def start(source: Source, journal: Journal, storing: Storing, counters: Counters) -> None:
    """Prepares a worker process.

    Args:
        source: listed already.
        journal: of the conversion; only its paths are used.
        storing: how images are checked and stored.
        counters: where to tell progress, and to look whether to stop.
    """
    _state.update(source=source, journal=journal, storing=storing, counters=counters)
    become_worker()


def become_worker() -> None:
    """Makes this process one that ends with its parent, leaves Ctrl-C to it, and opens large images."""
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
    """Writes a shard in every format, and its part of the journal; returns its name.

    Shards are renamed into place last, so one that is there is finished.

    Raises:
        Stopped: the conversion is to stop.
        ShardError: an image is bad and none may be, or too large for the memory.
        OSError: the source or the disk failed; nothing half-written is left.
    """
    journal: Journal = _state["journal"]
    drafts = {form: journal.drafts / f"{task.name}.{os.getpid()}.{form}" for form in journal.formats}
    bad: list[dict[str, str]] = []
    try:
        with ExitStack() as stack:
            shards: dict[str, TarShard | BetonShard] = {}
            for form, draft in drafts.items():
                shards[form] = _shard(form, draft, task)
                stack.enter_context(shards[form])
            for sample in _samples(task, bad, stack.enter_context(_ChecksOf(task))):
                for shard in shards.values():
                    shard.add(sample)
        tar = shards.get("tar")
        if isinstance(tar, TarShard):
            idx = journal.shard("tar", task.name).with_suffix(".idx")
            write_atomically(idx, tar.dali_index.encode(), drafts=journal.drafts)
        columns = next(iter(shards.values())).rows.columns()
        for form, shard in shards.items():
            columns[f"offset_{form}"] = shard.rows.columns()["offset"]
        del columns["offset"]
        files = {form: {"bytes": drafts[form].stat().st_size, "xxh128": shard.xxh128} for form, shard in shards.items()}
        counts = {"images": len(columns["bytes"]), "key_bytes": len(columns["keys"])}
        counts["labels"] = len(columns.get("label_values", ()))
        for draft in drafts.values():
            sync(draft)
        journal.write_record(task.name, {"files": files, **counts, "bad": bad}, columns)
        for form in sorted(drafts):  # as Journal.files_of has them
            drafts[form].replace(journal.shard(form, task.name))
    finally:
        for draft in (*drafts.values(), journal.checks(task.name)):
            draft.unlink(missing_ok=True)
    for form in journal.formats:
        sync(journal.folder(form))
    return task.name


def check(piece: Piece, checks_path: Path) -> None:
    """Checks images ahead of the process that writes their shard, to which anything but a whole JPEG is left."""
    source: Source = _state["source"]
    counters: Counters = _state["counters"]
    samples = piece.samples
    with suppress(OSError), Checks(checks_path) as checks:  # the shard is finished, or its writer meets the same
        for at, (name, place) in enumerate(zip(samples.names, samples.places, strict=True), piece.first):
            writer_at = counters.at(piece.task)
            if counters.is_stopped or writer_at < 0:
                return
            if writer_at >= at:
                continue
            checks.begin(at)
            whole = None
            with suppress(BadImage, MemoryError, OSError):
                found = source.load(name, place)
                whole = found if isinstance(found, bytes) and is_whole_jpeg(found) else None
            checks.end(at, whole)


def _shard(form: str, draft: Path, task: Task) -> TarShard | BetonShard:
    if form == "tar":
        return TarShard(draft)
    class_names = task.samples.class_names
    several = task.samples.label_ends is not None
    return BetonShard(draft, num_classes=len(class_names) if several else 0, class_names=class_names)


def _samples(task: Task, bad: list[dict[str, str]], checks: "_ChecksOf") -> Iterator[Sample]:
    """Yields the shard's good samples; bad ones are kept aside and listed."""
    source: Source = _state["source"]
    counters: Counters = _state["counters"]
    storing: Storing = _state["storing"]
    samples = task.samples
    facts = getattr(source, "facts", None)
    for at, (key, name) in enumerate(zip(samples.keys, samples.names, strict=True)):
        if counters.is_stopped:
            raise Stopped
        found: Any = b""
        counters.enter(task.number, at)
        try:
            found = source.load(name, samples.places[at])
            image = _stored(found, storing, is_whole=checks.has(at, found))
            if facts is not None and isinstance(found, bytes) and image.data == found:
                kind, orientation = facts(samples.places[at])
                image = replace(image, stored=kind, orientation=orientation)
        except MemoryError:
            raise ShardError(f"{name}: not enough memory to check and store it; fewer --workers need less") from None
        except BadImage as error:
            if storing.bad == "fail":
                raise ShardError(f"{name}: {error} (--bad quarantine leaves such images out)") from None
            kept = _keep_aside(task.first_sample + at, found if isinstance(found, bytes) else found.tobytes())
            bad.append({"source": name, "key": key, "reason": str(error), "kept": kept})
            counters.add(task.number, images=1, size=int(samples.sizes[at]), bad=1)
        else:
            yield Sample(key=key, label=int(samples.labels[at]), labels=samples.labels_of(at), image=image)
            counters.add(task.number, images=1, size=int(samples.sizes[at]), bad=0)
    counters.enter(task.number, -1)


class _ChecksOf:
    """What other processes know about a shard's images, once there is any."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._checks: Checks | None = None

    def __enter__(self) -> "_ChecksOf":
        return self

    def __exit__(self, *_: object) -> None:
        if self._checks is not None:
            self._checks.close()

    def has(self, at: int, found: Any) -> bool:
        """Returns whether another process has found an image's bytes to be whole."""
        counters: Counters = _state["counters"]
        if not counters.is_helped(self._task.number) or not isinstance(found, bytes):
            return False
        if self._checks is None:
            self._checks = Checks(_state["journal"].checks(self._task.name))
        return self._checks.has(at, found)


def _stored(found: Any, storing: Storing, *, is_whole: bool) -> StoredImage:
    return store(
        found,
        check="header" if is_whole else storing.check,
        mend=storing.bad == "fix",
        lossless=storing.lossless,
        resize_shorter=storing.resize_shorter,
        quality=storing.quality,
    )


def _keep_aside(position: int, data: bytes) -> str:
    """Stores a rejected image's bytes and returns their path in the set's folder."""
    journal: Journal = _state["journal"]
    path = Path(QUARANTINE) / f"{position:09d}.bin"
    for form in journal.formats:
        target = journal.folder(form) / path
        target.parent.mkdir(exist_ok=True)
        write_atomically(target, data, drafts=journal.drafts)
    return path.as_posix()
