"""The end of a conversion that ran in parts: one set, with the bytes that one machine would have written."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from maestri.shards.disk_space import require_space
from maestri.shards.errors import ShardError
from maestri.shards.files import sync, xxh128_of
from maestri.shards.finish import finish
from maestri.shards.journal import HEAD, JOURNAL, QUARANTINE, Journal, require_encoders
from maestri.shards.manifest import FILE_NAME, FORMATS, Manifest
from maestri.shards.parallel import Progress, Report, silent

_KEPT = re.compile(rf"{QUARANTINE}/[0-9]{{9,}}\.bin")
"""Paths, in a set, of images that were left out."""


def merge(out: Path, parts: Sequence[Path] = (), *, report: Report = silent) -> dict[str, Manifest]:
    """Makes a set of a conversion's parts and returns its manifest in each format.

    Args:
        out: where all parts were converted into, or a folder for the set.
        parts: folders that each hold some of the conversion's parts; hard links are made of their files where that is
            possible, else copies.  They are left as they are.
        report: called after each shard.

    Raises:
        ShardError: parts are missing, are being converted, or belong to different conversions.
    """
    parts = [part for part in parts if part.resolve() != out.resolve()]
    try:
        whole = _whole(out)
        if whole and not parts and (not (out / JOURNAL).exists() or _is_only_to_be_cleaned(out, whole)):
            return whole
        formats = _formats_of(parts[0] if parts else out)
        with ExitStack() as stack:
            opened = [stack.enter_context(_opened(part, formats)) for part in parts]
            if parts:
                _require_one(opened)
            target = stack.enter_context(Journal(out, formats))
            for journal in opened:
                if target.head and target.head["recipe"] != journal.head["recipe"]:
                    raise ShardError(f"{out} and {journal.out} hold parts of different conversions")
                if target.claim(journal.head):
                    return _whole(out)
                _take(journal, target, report)
            if not target.head:
                raise ShardError(f"{out} holds no finished part of a conversion; see maestri shards convert --part")
            return finish(target)
    except OSError as error:
        at = error.filename or out
        raise ShardError(f"{error.strerror or error}: {at}; once that is mended, the same command continues") from None


def _whole(out: Path) -> dict[str, Manifest]:
    """Returns the manifests of the sets that are in a folder already."""
    folders = [out, *(out / form for form in FORMATS)]
    found = [Manifest.read(folder) for folder in folders if (folder / FILE_NAME).is_file()]
    return {manifest.format: manifest for manifest in found}


def _is_only_to_be_cleaned(out: Path, whole: dict[str, Manifest]) -> bool:
    """Returns whether only the removal of the journal was interrupted, and removes it then."""
    head = out / JOURNAL / HEAD
    formats = _formats_of(out) if head.is_file() else tuple(form for form in FORMATS if form in whole)
    if set(formats) != set(whole):
        return False
    with Journal(out, formats) as journal:
        is_whole = journal.is_whole()
        if is_whole:
            journal.remove()
    return is_whole


def _formats_of(folder: Path) -> tuple[str, ...]:
    """Returns the formats of an unfinished conversion."""
    path = folder / JOURNAL / HEAD
    if not path.is_file():
        if (folder / FILE_NAME).exists():
            raise ShardError(f"{folder} is a whole set, and no part of one")
        raise ShardError(f"{folder} holds no finished part of a conversion; see maestri shards convert --part")
    try:
        return tuple(str(form) for form in json.loads(path.read_text(encoding="utf-8"))["formats"])
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is damaged ({error}); delete {folder}, and convert that part again") from None


def _opened(part: Path, formats: tuple[str, ...]) -> Journal:
    found = _formats_of(part)
    if found != formats:
        raise ShardError(f"{part} was converted into {' and '.join(found)}, other parts into {' and '.join(formats)}")
    return Journal(part, formats)


def _require_one(journals: Sequence[Journal]) -> None:
    """Raises ShardError unless all belong to one conversion."""
    first = journals[0]
    for journal in journals[1:]:
        for name in ("recipe", "part_count", "num_shards"):
            if journal.head.get(name) != first.head.get(name):
                raise ShardError(
                    f"{first.out} and {journal.out} hold parts of different conversions ({name} differs): the source "
                    "or a setting was not the same"
                )
        require_encoders(first.head, journal.head, f"{journal.out}, unlike {first.out},")


def _take(part: Journal, target: Journal, report: Report) -> None:
    """Brings a part's finished shards into the target: first what belongs to them, the shards themselves last."""
    there = target.finished()
    names = sorted(part.finished())
    fresh = [name for name in names if name not in there]
    for name in names:
        if name in there and part.record(name) != target.record(name):
            raise ShardError(f"{name} of {part.out} differs from that of {target.out}: it was converted otherwise")
    if fresh and part.out.stat().st_dev != target.out.stat().st_dev:
        sizes = [size["bytes"] for name in fresh for size in part.record(name)["files"].values()]
        require_space(target.out, sum(sizes))
    done = Progress()
    for name in fresh:
        record = part.record(name)
        for entry in record["bad"]:
            _take_kept(part, target, entry)
        written = {part.shard(form, name).relative_to(part.out): file for form, file in record["files"].items()}
        for path in part.files_of(name):
            if record["images"] or path.parts[0] == JOURNAL:  # a set has no shard without images
                _bring(part.out / path, target.out / path, target.drafts, written.get(path))
        done = Progress(
            images=done.images + record["images"],
            bytes=done.bytes + sum(file["bytes"] for file in record["files"].values()),
            bad=done.bad + len(record["bad"]),
        )
        report(done)


def _take_kept(part: Journal, target: Journal, entry: dict[str, Any]) -> None:
    """Brings the bytes of an image that was left out."""
    if not isinstance(entry.get("kept"), str) or not _KEPT.fullmatch(entry["kept"]):
        raise ShardError(f"{part.out} names a file outside its {QUARANTINE}: {str(entry.get('kept'))[:200]!a}")
    for form in target.formats:
        folder = target.folder(form) / QUARANTINE
        folder.mkdir(exist_ok=True)
        _bring(part.folder(form) / entry["kept"], target.folder(form) / entry["kept"], target.drafts)


def _bring(source: Path, to: Path, drafts: Path, written: dict[str, Any] | None = None) -> None:
    """Makes a file appear whole, as a hard link or a copy.

    Args:
        source: the file.
        to: where it is to appear.
        drafts: folder for the unfinished copy.
        written: ``bytes`` and ``xxh128`` of the file when it was written, where that is known.

    Raises:
        ShardError: it is a link to another file, or not what was written.
    """
    if source.is_symlink() or (source.parent.name == QUARANTINE and source.parent.is_symlink()):
        raise ShardError(f"{source} is a symbolic link, and no file that a conversion wrote")
    draft = drafts / f"{to.name}.merge"
    draft.unlink(missing_ok=True)
    is_copy = False
    try:
        os.link(source, draft)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, draft)
        sync(draft)
        is_copy = True
    if written is not None:
        size = draft.stat().st_size
        is_other = size != written["bytes"] or (is_copy and xxh128_of(draft) != written["xxh128"])
        if is_other:
            draft.unlink()
            what = f"has {size:,} bytes, not {written['bytes']:,}" if size != written["bytes"] else "has other bytes"
            raise ShardError(f"{source} {what} than were written; delete it, and convert that part again")
    draft.replace(to)
    draft.unlink(missing_ok=True)  # a link onto itself is no rename
    sync(to.parent)
