"""Whether a set's bytes are still those that were stored."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from maestri.shards import adopt
from maestri.shards.errors import ShardError
from maestri.shards.files import xxh128_of
from maestri.shards.index import FILE_NAME, Columns, open_columns
from maestri.shards.manifest import FILE_NAME as MANIFEST
from maestri.shards.manifest import Manifest
from maestri.shards.old_set import quarantined
from maestri.shards.parallel import Report, over_shards, silent
from maestri.shards.shard_damage import Damage, Task, look


def damage(folder: Path, *, workers: int = 1, report: Report = silent) -> Iterator[Damage]:
    """Yields what is wrong with a set, from all of its bytes: manifest, index, shards, and DALI's indices.

    Args:
        folder: of the set.
        workers: processes.
        report: called about five times a second.

    Raises:
        ShardError: a worker died.
        OSError: the storage failed.
    """
    try:
        manifest = Manifest.read(folder)
    except ShardError as error:
        yield Damage(file=str(folder / MANIFEST), problem=str(error).removeprefix(f"{folder / MANIFEST} "))
        return
    if not Manifest.is_as_written(folder):
        yield Damage(file=str(folder / MANIFEST), problem="a byte of it was changed since it was written")
    found, columns = _damaged_index(folder, manifest)
    yield from found
    base, is_ours = folder / manifest.base, manifest.source.get("kind") != adopt.KIND
    missing = {shard.name for shard in manifest.shards if not (base / shard.name).is_file()}
    for name in sorted(missing):
        yield Damage(file=str(base / name), problem="the shard is missing")
    if is_ours:
        extra = {path.name for path in base.glob(f"shard-*.{manifest.format}")} - {s.name for s in manifest.shards}
        left_out = {entry.get("shard") for entry in quarantined(folder)}  # by --drop-damaged, to the last image
        for name in sorted(name for name in extra if Path(name).stem not in left_out):
            yield Damage(file=str(base / name), problem="this shard is not in the manifest")
    tasks = [task for task in _tasks(folder, manifest, columns, is_whole=not found) if task.info.name not in missing]
    for lines in over_shards(look, tasks, workers=workers, report=report):
        yield from lines


def _damaged_index(folder: Path, manifest: Manifest) -> tuple[list[Damage], Columns | None]:
    path = folder / FILE_NAME
    found = []
    try:
        is_same = xxh128_of(path) == manifest.index.get("xxh128")
        if not is_same:
            found.append(Damage(file=str(path), problem="its checksum is not the manifest's (--repair makes it anew)"))
        return found, open_columns(path, manifest.index["columns"], manifest.num_samples)
    except (ShardError, OSError) as error:
        text = f"{error.strerror} (--repair makes it anew)" if isinstance(error, OSError) else str(error)
        return [Damage(file=str(path), problem=text)], None


def _tasks(folder: Path, manifest: Manifest, columns: Columns | None, *, is_whole: bool) -> Iterator[Task]:
    base, is_ours = folder / manifest.base, manifest.source.get("kind") != adopt.KIND
    first = 0
    for number, info in enumerate(manifest.shards):
        rows = None
        keys: tuple[str, ...] = ()
        if columns is not None:
            span = slice(first, first + info.num_samples)
            rows = {
                name: np.array(getattr(columns, name)[span], np.int64)
                for name in ("shard", "offset", "bytes", "width", "height", "orientation", "stored", "label", "crc32")
            }
            keys = tuple(_keys(columns, first, first + info.num_samples))
            if columns.label_end is not None and columns.label_values is not None:
                rows["label_end"] = np.array(columns.label_end[span], np.int64)
                begin = int(columns.label_end[first - 1]) if first else 0
                end = int(rows["label_end"][-1]) if info.num_samples else begin
                rows["label_values"] = np.array(columns.label_values[begin:end], np.int64)
                rows["label_end"] -= begin
            rows["shard"] -= number
        path = base / info.name
        idx = (folder / info.name).with_suffix(".idx") if manifest.format == "tar" else None
        yield Task(
            path=path, idx=idx, info=info, is_ours=is_ours, first_row=first, rows=rows, keys=keys,
            are_rows_whole=is_whole, index=folder / FILE_NAME, image=manifest.source.get("image", ""),
            label=manifest.source.get("label", ""),
        )  # fmt: skip
        first += info.num_samples


def _keys(columns: Columns, first: int, last: int) -> Iterator[str]:
    ends = columns.key_end[first:last].tolist()
    starts = [int(columns.key_end[first - 1]) if first else 0, *ends]
    for start, end in zip(starts, ends, strict=False):
        yield bytes(columns.keys[start:end]).decode(errors="backslashreplace")


def summary(folder: Path, found: list[Damage]) -> Mapping[str, Any]:
    """Returns what ``verify --json`` prints."""
    lines = [{name: value for name, value in asdict(line).items() if value is not None} for line in found]
    return {"set": str(folder), "is_whole": not found, "damage": lines}
