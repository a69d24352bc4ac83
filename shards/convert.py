"""A source turned into a set of shards: in parallel, exactly, and resumable after any interruption.

A shard is a fixed range of the shuffled source, so its bytes depend neither on the number of workers nor on where an
earlier attempt stopped.  Finished shards are kept; the manifest is written last and makes the set whole.
"""

import json
import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from maestri.shards import index, worker
from maestri.shards.errors import ShardError
from maestri.shards.files import sha256_of, write_atomically
from maestri.shards.images import JPEG_QUALITY, POLICY
from maestri.shards.manifest import Manifest, ShardInfo
from maestri.shards.plan import cut, recipe_of, shuffled
from maestri.shards.sources import Listing, Source, open_source
from maestri.shards.worker import JOURNAL, Task

QUARANTINE = "quarantine.jsonl"
POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Settings of a conversion; all but ``workers`` decide the shards' bytes."""

    format: Literal["tar"] = "tar"
    """What shards are: ``tar`` is plain WebDataset."""
    workers: int = 2
    """Processes that read, check and write."""
    shard_bytes: int = 256 * 2**20
    """Bytes of the source that go into a shard, about."""
    seed: int = 0
    """Of the global shuffle."""
    check: Literal["decode", "header"] = "decode"
    """``decode`` decodes every image once, which a GPU decoder needs; ``header`` only parses the header."""

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("shard_bytes", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ShardError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")


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
        source_path: a folder of images or an idx3 file.
        out: the set's folder; made if it is missing.  One left by the same command that was interrupted is finished.
        config: the settings.
        report: called about five times a second.

    Raises:
        ShardError: the source cannot be converted, ``out`` holds something else, no image is readable, the disk is
            full, or a worker died; what is finished stays.
    """
    source = open_source(source_path)
    listing = source.listing()
    settings = {"format": config.format, "shard_bytes": config.shard_bytes, "seed": config.seed}
    settings |= {"check": config.check, "quality": JPEG_QUALITY, "version": 1}
    recipe = recipe_of(listing.digest(), settings)
    tasks = _tasks(listing, config)
    if _prepare(out, recipe):
        return Manifest.read(out)
    try:
        _write_shards(source, out, tasks, config, report)
        manifest = _finish(source, listing, out, tasks, config, recipe)
    except OSError as error:
        at = f" ({error.filename})" if error.filename else ""
        raise ShardError(f"{error.strerror or error}{at}; run the same command again to continue") from None
    shutil.rmtree(out / JOURNAL)
    return manifest


def _tasks(listing: Listing, config: ConvertConfig) -> list[Task]:
    order = shuffled(len(listing.keys), config.seed)
    bounds = cut(listing.sizes[order], config.shard_bytes)
    width = max(5, len(str(len(bounds))))
    return [
        Task(
            name=f"shard-{number:0{width}d}",
            samples=order[first:last],
            keys=tuple(listing.keys[sample] for sample in order[first:last]),
            labels=listing.labels[order[first:last]],
            sizes=listing.sizes[order[first:last]],
        )
        for number, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    ]


def _prepare(out: Path, recipe: str) -> bool:
    """Makes the folder and its journal; returns whether the set is complete already.

    Raises:
        ShardError: the folder holds another set, or something else.
    """
    journal = out / JOURNAL
    try:
        if (out / "manifest.json").exists():
            if Manifest.read(out).recipe != recipe:
                raise ShardError(f"{out} holds a set made from another source or with other settings; choose another")
            shutil.rmtree(journal, ignore_errors=True)
            return True
        if (journal / "recipe").exists():
            if (journal / "recipe").read_text(encoding="utf-8") != recipe:
                raise ShardError(
                    f"{out} holds an unfinished conversion of another source or with other settings; finish that, "
                    "or delete the folder"
                )
            return False
        if out.exists() and any(path.name != JOURNAL for path in out.iterdir()):
            raise ShardError(f"{out} is not empty and holds no set of shards; choose another folder")
        journal.mkdir(parents=True, exist_ok=True)
        write_atomically(journal / "recipe", recipe.encode())
    except OSError as error:
        raise ShardError(f"cannot write to {out}: {error.strerror}") from None
    return False


def _write_shards(
    source: Source, out: Path, tasks: list[Task], config: ConvertConfig, report: Callable[[Progress], None]
) -> None:
    waiting = [task for task in tasks if not (out / f"{task.name}.tar").exists()]
    total = sum(len(task.samples) for task in tasks)
    resumed = total - sum(len(task.samples) for task in waiting)
    context = multiprocessing.get_context("forkserver")
    counters = context.Array("d", 3)

    def tell() -> None:
        images, size, bad = (int(value) for value in counters[:])
        report(Progress(images=resumed + images, bytes=size, bad=bad, total_images=total, resumed_images=resumed))

    tell()
    pool = ProcessPoolExecutor(
        min(config.workers, max(1, len(waiting))),
        mp_context=context,
        initializer=worker.start,
        initargs=(source, out.absolute(), config.check, counters),
    )
    with pool:
        futures: set[Future[str]] = {pool.submit(worker.run, task) for task in waiting}
        try:
            while futures:
                done, futures = wait(futures, timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")
                tell()
                for future in done:
                    future.result()
        except BrokenProcessPool:
            raise ShardError("a worker process died; run the same command again to continue") from None
        finally:
            pool.shutdown(cancel_futures=True)
    tell()


def _finish(
    source: Source, listing: Listing, out: Path, tasks: list[Task], config: ConvertConfig, recipe: str
) -> Manifest:
    """Writes quarantine list, index and manifest from the journal; the manifest makes the set whole."""
    infos, bad, parts = [], [], []
    for number, task in enumerate(tasks):
        record = json.loads((out / JOURNAL / f"{task.name}.json").read_text(encoding="utf-8"))
        with np.load(out / JOURNAL / f"{task.name}.npz") as stored:
            part = {name: stored[name] for name in stored.files}
        count = len(part["offset"])
        part["shard"] = np.full(count, number, np.int64)
        parts.append(part)
        bad += [{"shard": task.name, **entry} for entry in record["bad"]]
        name = f"{task.name}.tar"
        infos.append(ShardInfo(name=name, bytes=record["bytes"], num_samples=count, sha256=record["sha256"]))
    num_samples = sum(info.num_samples for info in infos)
    if not num_samples:
        shutil.rmtree(out)
        raise ShardError(f"none of the {len(bad)} images of {source.path} can be read; the first: {bad[0]['reason']}")
    write_atomically(out / QUARANTINE, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in bad).encode())
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
        recipe=recipe,
    )
    manifest.write(out)
    return manifest
