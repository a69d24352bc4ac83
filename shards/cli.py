"""``maestri shards``: convert, inspect and verify data sets."""

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from maestri.shards import convert as conversion
from maestri.shards.convert import QUARANTINE_LIST, ConvertConfig
from maestri.shards.errors import ShardError
from maestri.shards.manifest import Manifest
from maestri.shards.shard_set import ShardSet
from maestri.shards.verify import damage

Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]


def run(argv: list[str]) -> int:
    """Runs ``maestri shards`` and returns its exit code: 0, 1 after an error or damage, 2 after wrong usage."""
    logging.basicConfig(format="maestri shards: %(message)s", stream=sys.stderr)
    app = tyro.extras.SubcommandApp()
    app.command(name="convert")(convert)
    app.command(name="inspect")(inspect)
    app.command(name="verify")(verify)
    try:
        return int(app.cli(prog="maestri shards", args=argv, use_underscores=False) or 0)
    except SystemExit as stop:
        return int(stop.code or 0) if not isinstance(stop.code, str) else 2
    except (ShardError, OSError) as error:
        print(f"maestri shards: {error}", file=sys.stderr)
        return 1


def convert(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    *,
    config: Annotated[ConvertConfig, tyro.conf.arg(name="")] = ConvertConfig(),  # noqa: B008  # frozen
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Convert a data set into shards, once, for every training run after.

    SOURCE is a folder of images (one folder per class, or flat), an idx3 file such as train-images-idx3-ubyte.gz with
    its labels file beside it, or a folder of such files.  OUT becomes a set of shards: plain WebDataset tars with
    DALI's .idx beside each, an index and a manifest.  8-bit grey and YCbCr JPEGs keep their bytes; everything else
    becomes a JPEG of quality 100.  Images that cannot be read are left out, listed in OUT/quarantine.jsonl with the
    reason, and their bytes kept in OUT/quarantine.

    Interrupted at any moment, the same command finishes the job, to the same bytes.

    Args:
        source: What to convert.
        out: Folder for the set.
        config: Settings.
        as_json: Print the result as JSON.
    """
    console = Console(stderr=True)
    with _progress(console) as progress:
        bar = progress.add_task("converting", total=None, bytes=0, bad=0, resumed=0)

        def report(at: conversion.Progress) -> None:
            progress.update(
                bar, completed=at.images, total=at.total_images, bytes=at.bytes, bad=at.bad, resumed=at.resumed_images
            )

        manifest = conversion.convert(source, out, config, report=report)
    if manifest.num_quarantined and not as_json:
        text = f"{manifest.num_quarantined:,} images could not be read: see {out / QUARANTINE_LIST}"
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    if as_json:
        print(json.dumps(_facts(manifest)))
    else:
        Console().print(_table(out, manifest))
    return 0


def inspect(folder: Folder, *, as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> int:
    """Show what a set of shards holds, without reading its images.

    Args:
        folder: The set.
        as_json: Print JSON.
    """
    with ShardSet.open(folder) as shard_set:
        if as_json:
            print(json.dumps(_facts(shard_set.manifest)))
        else:
            Console().print(_table(folder, shard_set.manifest))
    return 0


def verify(folder: Folder) -> int:
    """Read every byte of a set and name each damaged shard and sample; exit code 1 if there is one.

    Args:
        folder: The set.
    """
    with ShardSet.open(folder) as shard_set:
        lines = list(damage(shard_set))
        for line in lines:
            print(line, file=sys.stderr)
        if not lines:
            Console().print(
                f"{folder}: {len(shard_set):,} images are whole", highlight=False, soft_wrap=True, markup=False
            )
    return 1 if lines else 0


class _Rates(ProgressColumn):
    """Images and megabytes per second since the start, and bad images so far."""

    def render(self, task: Task) -> Text:
        seconds = max(task.elapsed or 0.0, 1e-3)
        images = (task.completed - task.fields["resumed"]) / seconds
        megabytes = task.fields["bytes"] / 1e6 / seconds
        return Text(f"{images:,.0f} images/s  {megabytes:,.1f} MB/s  {task.fields['bad']} bad")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rates(), TextColumn("left"),
        TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip


def _facts(manifest: Manifest) -> dict[str, object]:
    facts = asdict(manifest)
    del facts["index"]
    return facts


def _table(folder: Path, manifest: Manifest) -> Table:
    table = Table(title=str(folder), show_header=False)
    rows = (
        ("images", f"{manifest.num_samples:,}"),
        ("classes", f"{len(manifest.class_names):,}" if manifest.class_names else "none"),
        ("shards", f"{len(manifest.shards):,}, {sum(s.bytes for s in manifest.shards) / 1e6:,.1f} MB"),
        ("left out", f"{manifest.num_quarantined:,}"),
        ("source", f"{manifest.source['kind']} {manifest.source['name']}"),
        ("kept", manifest.images["kept"]),
        ("transcoded", manifest.images["transcoded"]),
    )
    for name, value in rows:
        table.add_row(name, value)
    return table
