"""``maestri shards sample``."""

from pathlib import Path
from typing import Annotated

import tyro

from maestri.shards.commands.terminal import Folder, Json, print_json, say
from maestri.shards.contact_sheet import rows_for, sheet
from maestri.shards.errors import ShardError
from maestri.shards.shard_set import ShardSet

MAX_COUNT = 2500


def sample(
    folder: Folder,
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.png")],
    *,
    count: int = 36,
    seed: int = 0,
    class_name: Annotated[str, tyro.conf.arg(name="class", metavar="NAME")] = "",
    as_json: Json = False,
) -> int:
    """Draw random images of a set on one sheet, with the label under each, to see whether all is as it should be.

    Images stand upright (EXIF orientation applied) and whole, in the order of rows; small ones are enlarged by whole
    factors.  Images without labels have their key.  Writes OUT.png, or another format that its name says.

    For example:
      maestri shards sample /shards/imagenet sheet.png --count 64 --class n01440764

    Args:
        folder: The set.
        out: The picture.
        count: Images, 1 to 2500.
        seed: Which ones.
        class_name: Only of this class.
        as_json: Print the rows, keys and labels shown as JSON.
    """
    if not 1 <= count <= MAX_COUNT or seed < 0:
        raise ShardError(f"--count is {count} and --seed {seed}; expected 1 to {MAX_COUNT}, and 0 or more")
    with ShardSet.open(folder) as shard_set:
        rows = rows_for(shard_set, count=count, seed=seed, class_name=class_name)
        picture = sheet(shard_set, rows)
        try:
            picture.save(out)
        except ValueError as error:  # Pillow's word for an unknown extension
            raise ShardError(f"{out} cannot be written: {error}; call it something.png") from None
        if as_json:
            names = shard_set.manifest.class_names
            print_json([
                {"row": row, "key": shard_set.key(row), "labels": [names[label] for label in shard_set.labels_of(row)]}
                for row in rows.tolist()
            ])  # fmt: skip
        else:
            say(f"{out}: {len(rows)} images, {picture.width} × {picture.height} pixels")
    return 0
