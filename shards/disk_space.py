"""Whether a disk will hold what is to be written."""

import shutil
from pathlib import Path

from maestri.shards.errors import ShardError


def require_space(folder: Path, size: int) -> None:
    """Checks that the disk of a folder that exists has room for ``size`` bytes more.

    Raises:
        ShardError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ShardError(
            f"the set needs about {size / 1e9:,.1f} GB, and {folder} has {free / 1e9:,.1f} GB free; nothing was "
            "written (--no-check-space tries all the same)"
        )
