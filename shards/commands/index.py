"""``maestri shards index``."""

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from maestri.shards.adopt import AdoptConfig, adopt, shards_at
from maestri.shards.commands.terminal import Json, byte_progress, facts, print_json, print_set, say
from maestri.shards.finish import QUARANTINE_LIST


def index(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
    out: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[OUT]")] = None,
    *,
    config: Annotated[AdoptConfig, tyro.conf.arg(name="")] = AdoptConfig(),  # noqa: B008  # frozen
    as_json: Json = False,
) -> int:
    """Use tars or .beton files that are there already, where they lie: no byte of them is copied or changed.

    SRC is a folder of WebDataset tars or of .beton files, one such file, or a pattern like 'train-{000..146}.tar'; all
    in one folder.  OUT, by default that folder, gets index.bin, quarantine.jsonl, an .idx of each tar for DALI, and
    manifest.json last.  A manifest elsewhere points to the shards by a relative path: move both together.

    Rows are the images that every decoder takes as they are: 8-bit grey or YCbCr JPEGs.  All others stand in
    quarantine.jsonl with the reason; `maestri shards convert SRC OUT` makes JPEGs of them, in shards of its own.

    Rows have the order of the shards, so such a set is not shuffled unless its maker did it.  Where neighbours are
    alike, a range of rows is no random subset: convert it instead.

    Interrupted, it leaves no set, and the same command starts over.

    For example:
      maestri shards index /data/imagenet-wds
      maestri shards index '/data/cc12m/{00000..01242}.tar' /shards/cc12m --label txt --check header

    Args:
        source: The shards.
        out: Folder for the set.
        config: Settings.
        as_json: Print the manifest as JSON.
    """
    total = sum(path.stat().st_size for path in shards_at(source))
    with byte_progress(Console(stderr=True), "indexing", total_bytes=total) as report:
        folder, manifest = adopt(source, out, config, report=report)
    if as_json:
        print_json(facts(manifest))
        return 0
    if manifest.num_quarantined:
        say(f"{manifest.num_quarantined:,} images are no rows: see {folder / QUARANTINE_LIST}", error=True)
    print_set(folder, manifest)
    return 0
