"""``maestri shards inspect``."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from maestri.shards.commands.terminal import Folder, Json, facts, print_json, print_set, say
from maestri.shards.errors import ShardError
from maestri.shards.manifest import FILE_NAME, Manifest
from maestri.shards.shard_set import ShardSet

_COLUMNS = ("shard", "offset", "bytes", "width", "height", "orientation", "stored", "crc32")


def inspect(folder: Folder, *, rows: int = 0, as_json: Json = False) -> int:
    """Show what a set of shards holds, without reading its images.

    Of a folder of several sets, such as OUT/train and OUT/val or OUT/tar and OUT/beton, all are shown in one table.
    Nothing is written.

    For example:
      maestri shards inspect /shards/imagenet --rows 10
      maestri shards inspect /shards/imagenet --json

    Args:
        folder: The set, or a folder of sets.
        rows: Also show the first rows of the index.
        as_json: Print the manifest as JSON, of several sets by folder; with --rows under "rows".
    """
    if rows < 0:
        raise ShardError(f"--rows is {rows}; expected 0 or more")
    inside = _sets_in(folder)
    if not (folder / FILE_NAME).exists() and inside:
        manifests = {str(path.relative_to(folder)): Manifest.read(path) for path in inside}
        if as_json:
            print_json({name: facts(manifest) for name, manifest in manifests.items()})
        else:
            _print_all(folder, manifests)
        return 0
    with ShardSet.open(folder) as shard_set:
        found = [_row(shard_set, row) for row in range(min(rows, len(shard_set)))]
        if as_json:
            print_json(facts(shard_set.manifest) | ({"rows": found} if rows else {}))
        else:
            print_set(folder, shard_set.manifest)
            _print_rows(found)
    return 0


def _sets_in(folder: Path) -> list[Path]:
    """Returns the sets in a folder, one or two levels below."""
    if not folder.is_dir():
        return []
    return sorted(path.parent for level in ("*", "*/*") for path in folder.glob(f"{level}/{FILE_NAME}"))


def _print_all(folder: Path, manifests: dict[str, Manifest]) -> None:
    table = Table("set", "images", "classes", "shards", "format", "MB", "left out", "source", title=Text(str(folder)))
    for name, manifest in manifests.items():
        size = sum(shard.bytes for shard in manifest.shards) / 1e6
        source = f"{manifest.source.get('kind', '')} {manifest.source.get('name', '')}"
        table.add_row(
            Text(name), f"{manifest.num_samples:,}", f"{len(manifest.class_names):,}", f"{len(manifest.shards):,}",
            manifest.format, f"{size:,.1f}", f"{manifest.num_quarantined:,}", Text(source),
        )  # fmt: skip
    Console().print(table)


def _row(shard_set: ShardSet, row: int) -> dict[str, Any]:
    names = shard_set.manifest.class_names
    found: dict[str, Any] = {"row": row, "key": shard_set.key(row)}
    found["labels"] = [names[label] for label in shard_set.labels_of(row)]
    return found | {name: int(getattr(shard_set.columns, name)[row]) for name in _COLUMNS}


def _print_rows(rows: list[dict[str, Any]]) -> None:
    """Prints aligned columns that no terminal's width cuts; texts stand last."""
    if not rows:
        return
    names = ("row", *_COLUMNS, "labels", "key")
    lines = [names] + [tuple(_cell(row[name]) for name in names) for row in rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(names))]
    for line in lines:
        padded = zip(range(len(names)), line, widths, strict=True)
        cells = [cell.rjust(width) if at <= len(_COLUMNS) else cell.ljust(width) for at, cell, width in padded]
        say("  ".join(cells).rstrip())


def _cell(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
