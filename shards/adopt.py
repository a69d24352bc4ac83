"""Shards that somebody else made, taken where they lie: an index and a manifest, and no copy of a byte."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from maestri.shards.classes import class_names_of
from maestri.shards.errors import ShardError
from maestri.shards.gather import labels_of, locked, recipe_from, require_writable, write_set
from maestri.shards.journal import JOURNAL
from maestri.shards.manifest import FILE_NAME, FORMATS, Manifest
from maestri.shards.parallel import Report, over_shards, silent
from maestri.shards.scan import Scanned, ScanTask, scan
from maestri.shards.sources.file_patterns import files_at

KIND = "adopted"
"""Of the source in the manifest."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdoptConfig:
    """Settings of ``index``."""

    check: Literal["decode", "header"] = "decode"
    """``decode`` decodes every image once, which a GPU decoder needs; ``header`` only parses the header."""
    bad: Literal["quarantine", "fail"] = "quarantine"
    """An image that cannot be used as it is is no row and listed with the reason, or ends the command."""
    image: str = ""
    """Which tar member (such as jpg) or beton field holds the image, where it is not obvious."""
    label: str = ""
    """Which tar member, key of its .json member, or beton field holds the label; by default cls, then json's label."""
    classes: Path | None = None
    """Number classes as this set of shards does, or name them as this text file does, a name a line."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that read and check; by default one for each core."""

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= 1024:
            raise ShardError(f"--workers is {self.workers}; expected a number from 1 to 1024")


def shards_at(source: Path) -> tuple[Path, ...]:
    """Returns the shards that a path stands for, in the order of rows.

    Raises:
        ShardError: there are none, of both formats, or in several folders.
    """
    if source.is_dir():
        found = {form: sorted(source.glob(f"*.{form}")) for form in FORMATS}
        kinds = [form for form in FORMATS if found[form]]
        if len(kinds) > 1:
            raise ShardError(f"{source} holds .tar and .beton files; say which: {source}/*.tar or {source}/*.beton")
        files = tuple(found[kinds[0]]) if kinds else tuple(path for f in FORMATS for path in source.glob(f"**/*.{f}"))
        if not files:
            raise ShardError(f"{source} holds no .tar and no .beton files")
    else:
        files = files_at(source, ".tar")
    folders = sorted({path.parent.resolve() for path in files})
    if len(folders) > 1 or (source.is_dir() and folders[0] != source.resolve()):
        raise ShardError(
            f"the shards of {source} lie in {len(folders)} folders, such as {folders[0]}; a set has one: index each "
            "folder by itself, or bring the shards into one by hard links"
        )
    others = {path.suffix for path in files} - {f".{form}" for form in FORMATS}
    if others or len({path.suffix for path in files}) > 1:
        raise ShardError(
            f"{source} stands for {', '.join(sorted(p.name for p in files)[:3])} …; expected .tar or .beton"
        )
    return files


def adopt(source: Path, out: Path | None, config: AdoptConfig, *, report: Report = silent) -> tuple[Path, Manifest]:
    """Makes a set of shards that are there already and returns its folder and manifest.

    Args:
        source: a folder of shards, a shard, or a pattern such as ``train-{000..146}.tar``.
        out: the set's folder; by default the shards' own.
        config: the settings.
        report: called about five times a second.

    Raises:
        ShardError: the shards cannot be used, or ``out`` holds a set already or cannot be written to.
    """
    files = shards_at(source)
    home = files[0].parent
    out = home if out is None else out
    class_names = class_names_of(config.classes) if config.classes else ()
    try:
        is_new = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        try:
            return out, _adopt(files, home, out, config, class_names, report)
        finally:
            if is_new and not any(out.iterdir()):
                out.rmdir()
    except OSError as error:
        raise ShardError(f"{error.strerror or error}: {error.filename or out}") from None


def _adopt(
    files: Sequence[Path], home: Path, out: Path, config: AdoptConfig, class_names: tuple[str, ...], report: Report
) -> Manifest:
    require_writable(out)
    with locked(out):
        if (out / FILE_NAME).exists():
            raise ShardError(f"{out} holds a set of shards; delete its {FILE_NAME} to index it anew, or choose another")
        if (out / JOURNAL).exists():
            raise ShardError(f"{out} holds an unfinished conversion; finish that, or choose another folder")
        tasks = [
            ScanTask(path=path, check=config.check, bad=config.bad, image=config.image, label=config.label)
            for path in files
        ]
        found = list(over_shards(scan, tasks, workers=config.workers, report=report))
        return _write(found, home, out, config, class_names)


def _write(
    found: Sequence[Scanned], home: Path, out: Path, config: AdoptConfig, class_names: tuple[str, ...]
) -> Manifest:
    bad = [{"shard": shard.path.stem, **entry} for shard in found for entry in shard.bad]
    kept = [shard for shard in found if len(shard)]
    if not kept:
        first = f"; the first: {bad[0]['source']}: {bad[0]['reason']}" if bad else ""
        raise ShardError(f"none of the {len(bad)} images in {len(found)} shards of {home} can be used{first}")
    _warn(found)
    names = class_names or max((shard.class_names for shard in found), key=len)
    base = os.path.relpath(home.resolve(), out.resolve())
    if base == ".":
        _keep_others(kept)
        base = ""
    fields = {
        "source": {"kind": KIND, "name": home.resolve().name} | _used(config),
        "images": {
            "kept": "8-bit grey or YCbCr JPEG, as found",
            "transcoded": "nothing: other images are no rows",
            "check": config.check,
        },
        "seed": -1,
        "recipe": recipe_from(kept, {"kind": KIND, "image": config.image, "label": config.label}),
        "base": base,
    }
    return write_set(out, found, labels_of(kept, names), quarantined=bad, fields=fields)


def _used(config: AdoptConfig) -> dict[str, str]:
    """Returns what is needed to find images and labels in the shards again."""
    return {name: value for name, value in (("image", config.image), ("label", config.label)) if value}


def _keep_others(shards: Sequence[Scanned]) -> None:
    """Raises ShardError where an ``.idx`` beside a tar would be overwritten."""
    for shard in shards:
        path = shard.path.with_suffix(".idx")
        if shard.dali_index is not None and path.is_file() and path.read_bytes() != shard.dali_index.encode():
            raise ShardError(
                f"{path} is not the index of {shard.path.name}, and is not overwritten; delete it, or give another "
                "folder for the set: OUT"
            )


def _warn(found: Sequence[Scanned]) -> None:
    empty = [shard.path.name for shard in found if not len(shard)]
    if empty:
        _logger.warning("%d shards hold no image that can be used and are left out, such as %s", len(empty), empty[0])
    ignored = sum(shard.num_ignored for shard in found)
    if ignored:
        _logger.warning("%d samples have no image member and are left out", ignored)
    nameless = [s.path.name for s in found if len(s) and s.dali_index is None and s.path.suffix == ".tar"]
    if nameless:
        _logger.warning("%d tars get no .idx: DALI takes no names with blanks, as in %s", len(nameless), nameless[0])
