"""``maestri shards verify``."""

import os
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from maestri.shards.commands.terminal import Folder, Json, byte_progress, facts, print_json, say
from maestri.shards.errors import ShardError
from maestri.shards.manifest import Manifest
from maestri.shards.repair import repair
from maestri.shards.verify import damage, summary

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


def verify(
    folder: Folder,
    *,
    repair: Flag = False,
    classes: Path | None = None,
    drop_damaged: Flag = False,
    workers: int | None = None,
    as_json: Json = False,
) -> int:
    """Read every byte of a set and name each damaged file and sample; exit code 1 if there is one.

    Compared are the manifest, the index, every shard (images, labels, and what lies between them), and DALI's .idx
    files, by the checksums that were taken when they were written.  Missing and surplus shards are named, too.  Without
    --repair nothing is written.

    With --repair, index.bin, .idx files and manifest.json are made anew from the shards, which are only read.  If
    images are damaged, nothing is written and they are named; --drop-damaged leaves them out of the new index.  What a
    tar does not hold is lost with the index or manifest: class names (--classes FILE; .beton files hold them), the EXIF
    orientation of images that were encoded anew, and which ones those were.  Where that makes no difference, the index
    gets the same bytes again.  Interrupted, the same command starts over.

    For example:
      maestri shards verify /shards/imagenet
      maestri shards verify /shards/imagenet --repair

    Args:
        folder: The set.
        repair: Make index, manifest and .idx files anew.
        classes: With --repair, where the manifest is lost: names of the classes by number, one a line, or another set.
        drop_damaged: With --repair: leave damaged images out, and shards that are missing.
        workers: Processes that read; by default one for each core.
        as_json: Print the result as JSON.
    """
    num_workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if not 1 <= num_workers <= 1024:
        raise ShardError(f"--workers is {workers}; expected a number from 1 to 1024")
    if (drop_damaged or classes) and not repair:
        raise ShardError(
            f"{'--drop-damaged' if drop_damaged else '--classes'} is for --repair; add it, or leave it out"
        )
    if repair:
        return _repair(folder, classes, drop_damaged, num_workers, as_json)
    console = Console(stderr=True)
    total, images = _size_of(folder)
    with byte_progress(console, "verifying", total_bytes=total, total_images=images) as report:
        found = []
        for line in damage(folder, workers=num_workers, report=report):
            found.append(line)
            if not as_json:
                say(str(line), error=True)
    if as_json:
        print_json(summary(folder, found))
    elif not found:
        say(f"{folder}: {images:,} images are whole")
    return 1 if found else 0


def _repair(folder: Path, classes: Path | None, drop_damaged: bool, workers: int, as_json: bool) -> int:
    total, images = _size_of(folder)
    with byte_progress(Console(stderr=True), "repairing", total_bytes=total, total_images=images) as report:
        done = repair(folder, classes=classes, drop_damaged=drop_damaged, workers=workers, report=report)
    if as_json:
        print_json({"is_identical": done.is_identical, "notes": done.notes, "manifest": facts(done.manifest)})
        return 0
    for note in done.notes:
        say(note, error=True)
    same = ", the index as it was" if done.is_identical else ""
    say(f"{folder}: {done.manifest.num_samples:,} images in {len(done.manifest.shards):,} shards{same}")
    return 0


def _size_of(folder: Path) -> tuple[int, int]:
    try:
        manifest = Manifest.read(folder)
    except ShardError:
        return sum(path.stat().st_size for path in folder.glob("*") if path.suffix in (".tar", ".beton")), 0
    return sum(shard.bytes for shard in manifest.shards), manifest.num_samples
