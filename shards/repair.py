"""Index, manifest and DALI's indices of a set made anew from its shards, unless their images are damaged."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from maestri.shards.classes import class_names_of
from maestri.shards.errors import ShardError
from maestri.shards.gather import labels_of, locked, recipe_from, write_index, write_set
from maestri.shards.journal import JOURNAL
from maestri.shards.manifest import Manifest
from maestri.shards.old_set import OldRow, OldSet
from maestri.shards.old_set import quarantined as quarantined_in
from maestri.shards.parallel import Report, over_shards, silent
from maestri.shards.scan import Scanned, ScanTask, scan


@dataclass(frozen=True, kw_only=True, slots=True)
class Repaired:
    """What became of a set."""

    manifest: Manifest
    """The new one."""
    notes: tuple[str, ...]
    """What could not be had back, and what was left out; a line each."""
    is_identical: bool
    """Whether the index is, byte for byte, the one that was lost."""


def repair(
    folder: Path,
    *,
    classes: Path | None = None,
    drop_damaged: bool = False,
    workers: int = 1,
    report: Report = silent,
) -> Repaired:
    """Makes everything of a set but its shards anew; shards are only read.

    Args:
        folder: of the set.
        classes: names of the classes by number, where the manifest is lost: a set, or a file with one a line.
        drop_damaged: leave damaged images out, and shards that are missing or cannot be read.
        workers: processes.
        report: called about five times a second.

    Raises:
        ShardError: images are damaged or missing and ``drop_damaged`` is not set; nothing was written then.
    """
    if not folder.is_dir():
        raise ShardError(f"there is no folder {folder}")
    with locked(folder):
        return _repair(folder, classes, drop_damaged, workers, report)


def _repair(folder: Path, classes: Path | None, drop_damaged: bool, workers: int, report: Report) -> Repaired:
    if (folder / JOURNAL).exists():
        raise ShardError(f"{folder} holds an unfinished conversion; run the same command again, or merge its parts")
    old = OldSet(folder)
    found, problems = _scanned(old, workers, report)
    if problems and not drop_damaged:
        raise ShardError(
            f"{len(problems)} things are damaged and nothing was written; --drop-damaged leaves them out: "
            + "; ".join(_first(entry["reason"] for entry in problems))
        )
    if not any(len(shard) for shard in found):
        raise ShardError(f"no image of {folder} is whole; nothing was written")
    notes = list(old.notes) + [f"left out: {entry['source']}: {entry['reason']}" for entry in problems]
    given = class_names_of(classes) if classes else old.class_names or max((s.class_names for s in found), key=len)
    if old.manifest is None and not given:
        notes.append("class names are lost: classes are called 0, 1, … (--classes FILE names them)")
    kept = [shard for shard in found if len(shard)]
    labels = labels_of(kept, given)
    quarantined = quarantined_in(folder)
    quarantined += [entry for entry in problems if entry not in quarantined]  # a repair that was killed listed them
    if old.is_whole and not problems:
        kept, is_identical = _as_it_was(old, kept, labels)
        if not is_identical:
            notes.append("codes and orientations of images that were encoded anew are lost: they count as kept")
    else:
        kept, is_identical = [_with_old_facts(shard, old) for shard in kept], False
    given_fields = old.fields | {"recipe": old.fields.get("recipe") or recipe_from(kept, {"kind": "repaired"})}
    manifest = write_set(folder, kept, labels, quarantined=quarantined, fields=given_fields)
    return Repaired(manifest=manifest, notes=tuple(notes), is_identical=is_identical)


def _scanned(old: OldSet, workers: int, report: Report) -> tuple[list[Scanned], list[dict[str, str]]]:
    """Returns what is in the shards, and what is damaged in them."""
    problems = [_entry(path, "", "the shard is missing") for path in old.paths if not path.is_file()]
    found: list[Scanned] = []
    tasks = [
        ScanTask(
            path=path,
            check="decode",
            is_ours=not old.is_adopted,
            known=old.xxh128_of(path.name),
            image=old.member("image"),
            label=old.member("label"),
        )
        for path in old.paths
        if path.is_file()
    ]
    for result in over_shards(_try, tasks, workers=workers, report=report):
        if isinstance(result, dict):
            problems.append(result)
            continue
        expected = old.xxh128_of(result.path.name)
        is_changed, known = result.xxh128 != expected, old.rows_of(result.path.name)
        if is_changed and expected and not known and (result.path.suffix == ".tar" or old.is_adopted):
            reason = "the shard is damaged, and without the index it cannot be told which of its images is"
            problems.append(_entry(result.path, "", reason))
            continue
        if not old.is_adopted:
            problems += [
                {"shard": result.path.stem, **entry, "reason": f"damaged in the shard: {entry['reason']}"}
                for entry in result.bad
            ]
        if is_changed:
            if old.is_adopted:  # some images were no rows before
                gone = sorted(set(known) - set(result.columns["offset"].tolist()))
                problems += [_entry(result.path, "", f"the image at byte {at} is damaged") for at in gone]
            wrong = dict(_wrong_rows(result, known, old.is_half_repaired))
            problems += [_entry(result.path, result.keys[row], reason) for row, reason in wrong.items()]
            result = _without(result, list(wrong))
            if expected:
                old.notes.append(f"{result.path.name} is not what the manifest says; its other images are whole")
        found.append(result)
    return found, problems


def _try(task: ScanTask, count: Any) -> Scanned | dict[str, str]:
    try:
        return scan(task, count)
    except ShardError as error:
        rescue = "if the index is whole, `maestri shards repack` saves its images"
        text = str(error).replace(str(task.path), task.path.name)
        return _entry(task.path, "", f"the shard cannot be read ({text}); {rescue}")


def _wrong_rows(shard: Scanned, known: Mapping[int, OldRow], is_half_repaired: bool) -> Iterator[tuple[int, str]]:
    """Yields rows of a changed shard that the old index has otherwise, or an interrupted repair had left out."""
    columns = shard.columns
    for row, (offset, checksum) in enumerate(zip(columns["offset"].tolist(), columns["crc32"].tolist(), strict=True)):
        before = known.get(offset)
        if before is None:
            if is_half_repaired:
                yield row, "it was left out by a repair that was interrupted"
            continue
        if before.crc32 != checksum:
            yield row, "its CRC-32 is not the index's"
        elif before.labels != _numbers(shard.labels[row]) and not isinstance(shard.labels[row], str):
            yield row, f"its label is {shard.labels[row]}; the index has {list(before.labels)}"


def _numbers(label: Any) -> tuple[int, ...]:
    values = label if isinstance(label, list) else [label]
    return tuple(value for value in values if isinstance(value, int) and value >= 0)


def _without(shard: Scanned, rows: Sequence[int]) -> Scanned:
    """Returns a shard without some of its rows."""
    if not rows:
        return shard
    left = np.setdiff1d(np.arange(len(shard)), np.array(rows))
    keys = [shard.keys[row].encode() for row in left.tolist()]
    columns = {name: values[left] for name, values in shard.columns.items() if name != "keys"}
    columns["keys"] = np.frombuffer(b"".join(keys), np.uint8)
    return replace(shard, columns=columns, labels=[shard.labels[row] for row in left.tolist()])


def _as_it_was(old: OldSet, kept: list[Scanned], labels: Any) -> tuple[list[Scanned], bool]:
    """Returns the shards with what a tar does not hold, from the old index if that gives the index that was lost."""
    assert old.manifest is not None
    wanted = str(old.manifest.index.get("xxh128") or "none")
    for shards in ([_with_old_facts(shard, old) for shard in kept], kept):
        if write_index(old.folder, shards, labels, wanted=wanted)["xxh128"] == wanted:
            return shards, True
    return [_with_old_facts(shard, old) for shard in kept], False


def _with_old_facts(shard: Scanned, old: OldSet) -> Scanned:
    """Returns a tar's rows with orientation and code of the old index, where that agrees about the image."""
    if shard.path.suffix != ".tar":
        return shard
    known = old.rows_of(shard.path.name)
    columns = dict(shard.columns)
    columns["orientation"], columns["stored"] = columns["orientation"].copy(), columns["stored"].copy()
    for row, offset in enumerate(columns["offset"].tolist()):
        before = known.get(offset)
        if before is not None and 1 <= before.orientation <= 8:
            columns["orientation"][row], columns["stored"][row] = before.orientation, before.stored
    return replace(shard, columns=columns)


def _entry(path: Path, key: str, reason: str) -> dict[str, str]:
    return {"shard": path.stem, "source": f"{path.name}{':' if key else ''}{key}", "key": key, "reason": reason}


def _first(texts: Iterator[str], most: int = 3) -> list[str]:
    found = list(texts)
    return found[:most] + ["…"] * (len(found) > most)
