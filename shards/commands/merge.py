"""``maestri shards merge``."""

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from maestri.shards.commands.terminal import Json, byte_progress, facts, print_json, print_set, say
from maestri.shards.finish import QUARANTINE_LIST
from maestri.shards.merge import merge as merge_parts


def merge(
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    parts: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[PART …]")] = (),
    *,
    as_json: Json = False,
) -> int:
    """Finish a conversion that ran in parts on several machines: the same bytes as from one.

    Where all parts were converted into the same OUT, name that alone.  Where each machine had a folder of its own, name
    a new OUT and all of them: shards are linked into OUT if they lie on the same disk, else copied, and the parts are
    left as they are.  index.bin, quarantine.jsonl and manifest.json are written last.

    Missing parts are named, and nothing is lost: run them, then this again.  Interrupted, the same command continues.

    For example:
      maestri shards convert /data/train /nfs/shards --part 1/2      (on one machine)
      maestri shards convert /data/train /nfs/shards --part 2/2      (on the other)
      maestri shards merge /nfs/shards

    Args:
        out: Folder of the set.
        parts: Folders that parts were converted into.
        as_json: Print the manifest as JSON, or those of several formats.
    """
    with byte_progress(Console(stderr=True), "merging", total_bytes=0) as report:
        found = merge_parts(out, parts, report=report)
    if as_json:
        plain = {form: facts(manifest) for form, manifest in found.items()}
        print_json(next(iter(plain.values())) if len(plain) == 1 else plain)
        return 0
    for form, manifest in found.items():
        at = out / form if len(found) > 1 else out
        if manifest.num_quarantined:
            say(f"{manifest.num_quarantined:,} images could not be read: see {at / QUARANTINE_LIST}", error=True)
        print_set(at, manifest)
    return 0
