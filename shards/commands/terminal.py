"""What commands share: progress bars, tables, JSON."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from maestri.shards import parallel
from maestri.shards.manifest import Manifest

Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SET")]
Json = Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff]


class _Done(ProgressColumn):
    """Images done, of how many if that is known."""

    def render(self, task: Task) -> Text:
        of = f"/{task.fields['total_images']:,}" if task.fields["total_images"] else ""
        return Text(f"{task.fields['images']:,}{of} images")


class _Rates(ProgressColumn):
    """Images and megabytes per second since the start, and bad images so far."""

    def render(self, task: Task) -> Text:
        seconds = max(task.elapsed or 0.0, 1e-3)
        images = (task.fields["images"] - task.fields["resumed"]) / seconds
        megabytes = task.fields["bytes"] / 1e6 / seconds
        return Text(f"{images:,.0f} images/s  {megabytes:,.1f} MB/s  {task.fields['bad']} bad")


@contextmanager
def progress_bar(console: Console, what: str) -> Iterator[Any]:
    """Gives a function that takes ``completed``, ``total`` and fields of the bar; shows nothing but on a terminal."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), _Done(), _Rates(), TextColumn("left"), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        bar = progress.add_task(what, total=None, images=0, total_images=0, bytes=0, bad=0, resumed=0)
        yield lambda **fields: progress.update(bar, **fields)


@contextmanager
def byte_progress(console: Console, what: str, *, total_bytes: int, total_images: int = 0) -> Iterator[parallel.Report]:
    """Gives a function that shows how much was read."""
    with progress_bar(console, what) as update:
        yield lambda at: update(
            completed=at.bytes, total=total_bytes, images=at.images, bytes=at.bytes, bad=at.bad,
            total_images=total_images,
        )  # fmt: skip


def say(text: str, *, error: bool = False) -> None:
    """Prints a line as it is, whatever stands in it."""
    Console(stderr=error).print(text, highlight=False, soft_wrap=True, markup=False)


def facts(manifest: Manifest) -> dict[str, Any]:
    """Returns a manifest for JSON, without the index's layout."""
    found = asdict(manifest)
    del found["index"]
    return found


def print_set(folder: Path, manifest: Manifest) -> None:
    """Prints what a set is, in a table."""
    table = Table(title=Text(str(folder)), show_header=False)
    several = " (an image may have several)" if manifest.labels == "several" else ""
    size = sum(shard.bytes for shard in manifest.shards)
    rows = [
        ("images", f"{manifest.num_samples:,}"),
        ("classes", f"{len(manifest.class_names):,}{several}" if manifest.class_names else "none"),
        ("shards", f"{len(manifest.shards):,} {manifest.format}, {size / 1e6:,.1f} MB"),
        ("left out", f"{manifest.num_quarantined:,}"),
        ("source", f"{manifest.source.get('kind', '')} {manifest.source.get('name', '')}"),
        ("shuffle", "none: the source's own order" if manifest.seed < 0 else f"seed {manifest.seed}"),
        *((name, text) for name, text in manifest.images.items()),
    ]
    if manifest.base:
        rows.insert(3, ("shards lie in", manifest.base))
    for name, value in rows:
        table.add_row(name, Text(value))
    Console().print(table)


def print_json(value: Any) -> None:
    """Prints one line."""
    print(json.dumps(value))
