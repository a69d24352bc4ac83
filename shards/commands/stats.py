"""``maestri shards stats``."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from maestri.shards.commands.terminal import Folder, Json, print_json, say
from maestri.shards.errors import ShardError
from maestri.shards.shard_set import ShardSet
from maestri.shards.stats import PERCENTILES
from maestri.shards.stats import stats as stats_of

_MEASURES = (
    ("width", "width, pixels"), ("height", "height, pixels"), ("aspect", "width / height"),
    ("megapixels", "megapixels"), ("bytes_per_image", "bytes"),
)  # fmt: skip


def stats(folder: Folder, *, pixels: int = 0, seed: int = 0, as_json: Json = False) -> int:
    """Show how a set is made up: images per class, sizes, formats, duplicates.

    All of it comes from the index, in seconds for a million images, but the channels' mean and standard deviation:
    --pixels N decodes N random images.  Duplicates are images with the same stored bytes (CRC-32 and size); those whose
    labels differ are mistakes in the data.  Nothing is written.

    For example:
      maestri shards stats /shards/imagenet --pixels 2000

    Args:
        folder: The set.
        pixels: Images to decode for mean and standard deviation; 0 for none.
        seed: Which images those are.
        as_json: Print everything as JSON.
    """
    if pixels < 0 or seed < 0:
        raise ShardError(f"--{'pixels' if pixels < 0 else 'seed'} is {min(pixels, seed)}; expected 0 or more")
    with ShardSet.open(folder) as shard_set:
        found = stats_of(shard_set, num_pixels=pixels, seed=seed, workers=len(os.sched_getaffinity(0)))
    if as_json:
        print_json(found)
    else:
        _print(folder, found)
    return 0


def _print(folder: Path, found: dict[str, Any]) -> None:
    console = Console()
    say(f"{folder}: {found['images']:,} images, {found['bytes'] / 1e6:,.1f} MB")
    sizes = Table("percentile", *(f"{p} %" for p in PERCENTILES), title="images")
    for name, title in _MEASURES:
        sizes.add_row(title, *(f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" for value in found[name].values()))
    console.print(sizes)
    counts = Table("", "images", title="what they are")
    for title, group in (("stored: ", found["stored"]), ("orientation ", found["orientations"])):
        for name, count in group.items():
            counts.add_row(Text(f"{title}{name}"), f"{count:,}")
    console.print(counts)
    _print_classes(console, found["classes"])
    _print_duplicates(found["duplicates"])
    if "pixels" in found:
        mean, std = (", ".join(f"{value:.4f}" for value in found["pixels"][name]) for name in ("mean", "std"))
        say(f"channels of {found['pixels']['images']:,} random images (0–1): mean {mean}; standard deviation {std}")


def _print_classes(console: Console, classes: dict[str, Any]) -> None:
    if not classes["number"]:
        say("no labels")
        return
    title = (
        f"{classes['number']:,} classes: {classes['min']:,} to {classes['max']:,} images, median {classes['median']:,g}"
    )
    table = Table("smallest", "images", "largest", "images", title=title)
    pairs = zip(classes["smallest"].items(), classes["largest"].items(), strict=True)
    for (small, few), (large, many) in pairs:
        table.add_row(Text(small), f"{few:,}", Text(large), f"{many:,}")
    console.print(table)
    if classes["without_label"]:
        say(f"{classes['without_label']:,} images have no label")


def _print_duplicates(duplicates: dict[str, Any]) -> None:
    say(
        f"duplicates: {duplicates['surplus_images']:,} surplus images in {duplicates['groups']:,} groups; "
        f"{duplicates['groups_with_differing_labels']:,} groups with differing labels"
    )
    for group in duplicates["first_with_differing_labels"][:5]:
        say("  " + "; ".join(f"{key} ({', '.join(names) or 'none'})" for key, names in group.items()))
