"""A source turned into a set of shards: in parallel, exactly, and resumable after any interruption.

A shard is a fixed range of the shuffled source, so its bytes depend neither on the number of workers nor on where an
earlier attempt stopped.  Finished shards are kept; the manifest is written last and makes the set whole.
"""

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from maestri.shards import index, worker
from maestri.shards.byte_size import ByteSize
from maestri.shards.errors import ShardError
from maestri.shards.files import sha256_of, write_atomically
from maestri.shards.images import JPEG_QUALITY, POLICY
from maestri.shards.journal import Journal
from maestri.shards.manifest import Manifest, ShardInfo
from maestri.shards.plan import cut, recipe_of, shuffled
from maestri.shards.shard_set import ShardSet
from maestri.shards.sources import Listing, Source, open_source
from maestri.shards.worker import Counters, Task

QUARANTINE_LIST = "quarantine.jsonl"
POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Settings of a conversion; all but ``workers`` decide the shards' bytes."""

    split: str = ""
    """Of SOURCE, where it has several: a subfolder, or an idx3 file's first word (test also finds t10k)."""
    format: Literal["tar"] = "tar"
    """What shards are: ``tar`` is plain WebDataset."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that read, check and write; by default one for each core."""
    shard_bytes: ByteSize = 256 * 2**20
    """Bytes of the source that go into a shard, about; also as 500MB or 1GiB."""
    seed: int = 0
    """Of the global shuffle."""
    check: Literal["decode", "header"] = "decode"
    """``decode`` decodes every image once, which a GPU decoder needs; ``header`` only parses the header."""

    def __post_init__(self) -> None:
        for name, least, most in (("workers", 1, 1024), ("shard_bytes", 1, 2**62), ("seed", 0, 2**63 - 1)):
            if not least <= getattr(self, name) <= most:
                flag = f"--{name.replace('_', '-')}"
                raise ShardError(f"{flag} is {getattr(self, name)}; expected a number from {least} to {most}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a conversion is."""

    images: int
    """Done, bad ones included."""
    bytes: int
    """Of the source, done."""
    bad: int
    """Quarantined."""
    total_images: int
    """In the source."""
    resumed_images: int
    """Of those done, found finished at the start."""


def convert(
    source_path: Path, out: Path, config: ConvertConfig, *, report: Callable[[Progress], None] = lambda _: None
) -> Manifest:
    """Converts a source and returns the manifest of the set.

    Args:
        source_path: a folder of images, a folder with idx3 files, or an idx3 file.
        out: the set's folder; made if it is missing.  One left by the same command that was interrupted is finished.
        config: the settings.
        report: called about five times a second.

    Raises:
        ShardError: the source cannot be converted, ``out`` holds something else, no image is readable, the disk is
            full, or a worker died; what is finished stays.
    """
    source = open_source(source_path, split=config.split)
    if out.resolve().is_relative_to(source.path.resolve()):
        raise ShardError(f"{out} lies inside the source {source.path}; choose a folder outside of it")
    listing = source.listing()
    settings = {"format": config.format, "shard_bytes": config.shard_bytes, "seed": config.seed}
    settings |= {"check": config.check, "quality": JPEG_QUALITY, "version": 1, "kind": source.kind}
    recipe = recipe_of(listing.digest(), settings)
    tasks = _tasks(listing, config)
    try:
        with Journal(out, recipe) as journal:
            if journal.is_complete:
                ShardSet.open(out).close()
                return Manifest.read(out)
            _write_shards(source, out, tasks, config, report)
            manifest = _finish(source, listing, journal, tasks, config)
            journal.remove()
            return manifest
    except OSError as error:
        at = error.filename or out
        raise ShardError(f"{error.strerror or error}: {at}; once that is mended, the same command continues") from None


def _tasks(listing: Listing, config: ConvertConfig) -> list[Task]:
    order = shuffled(len(listing.keys), config.seed)
    bounds = cut(listing.sizes[order], config.shard_bytes)
    width = max(5, len(str(len(bounds))))
    return [
        Task(
            name=f"shard-{number:0{width}d}",
            number=number,
            samples=order[first:last],
            keys=tuple(listing.keys[sample] for sample in order[first:last]),
            labels=listing.labels[order[first:last]],
            sizes=listing.sizes[order[first:last]],
        )
        for number, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    ]


def _write_shards(
    source: Source, out: Path, tasks: list[Task], config: ConvertConfig, report: Callable[[Progress], None]
) -> None:
    """Writes all shards that are not there yet."""
    waiting = [task for task in tasks if not (out / f"{task.name}.tar").exists()]
    total = sum(len(task.samples) for task in tasks)
    resumed = total - sum(len(task.samples) for task in waiting)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["maestri.shards.worker", "maestri.shards.webdataset_writer"])
    counters = Counters(context, len(tasks))

    def tell() -> None:
        images, size, bad = counters.totals()
        report(Progress(images=resumed + images, bytes=size, bad=bad, total_images=total, resumed_images=resumed))

    tell()
    if not waiting:
        return
    pool = ProcessPoolExecutor(
        min(config.workers, len(waiting)),
        mp_context=context,
        initializer=worker.start,
        initargs=(source, out.absolute(), config.check, counters),
    )
    try:
        futures: set[Future[str]] = {pool.submit(worker.run, task) for task in waiting}
        while futures:
            done, futures = wait(futures, timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")
            tell()
            for future in done:
                future.result()
    except BrokenProcessPool:
        raise ShardError("a worker process died; run the same command again to continue") from None
    finally:
        counters.stop()
        pool.shutdown(cancel_futures=True)
    tell()


def _finish(source: Source, listing: Listing, journal: Journal, tasks: list[Task], config: ConvertConfig) -> Manifest:
    """Writes quarantine list, index and manifest from the journal; the manifest makes the set whole."""
    out = journal.out
    infos: list[ShardInfo] = []
    bad: list[dict[str, str]] = []
    parts = []
    for task in tasks:
        record, part = journal.record(task.name)
        count = len(part["offset"])
        part["shard"] = np.full(count, len(infos), np.int64)
        parts.append(part)
        bad += [{"shard": task.name, **entry} for entry in record["bad"]]
        if not count:
            journal.drop_shard(task.name)  # DALI refuses an empty one
            continue
        name = f"{task.name}.tar"
        infos.append(ShardInfo(name=name, bytes=record["bytes"], num_samples=count, sha256=record["sha256"]))
    num_samples = sum(info.num_samples for info in infos)
    if not num_samples:
        journal.discard([task.name for task in tasks])
        first = f"{bad[0]['source']}: {bad[0]['reason']}"
        raise ShardError(f"none of the {len(bad)} images of {source.path} can be read; the first: {first}")
    listed = "".join(json.dumps(entry) + "\n" for entry in bad)
    write_atomically(out / QUARANTINE_LIST, listed.encode())
    joined: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    joined["key_end"] = np.cumsum(joined.pop("key_bytes"))
    content, layout = index.encode(joined, joined.pop("keys").tobytes())
    write_atomically(out / index.FILE_NAME, content)
    manifest = Manifest(
        source={"kind": source.kind, "name": source.path.resolve().name},
        class_names=listing.class_names,
        num_samples=num_samples,
        num_quarantined=len(bad),
        images={**POLICY, "check": config.check},
        seed=config.seed,
        shards=tuple(infos),
        index={"bytes": len(content), "sha256": sha256_of(out / index.FILE_NAME), "columns": layout},
        recipe=journal.recipe,
    )
    manifest.write(out)
    return manifest
