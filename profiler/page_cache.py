"""What of a data set the operating system keeps in memory."""

import os

from maestri.shards.shard_set import ShardSet


def drop_from_page_cache(shard_set: ShardSet) -> None:
    """Asks the operating system to forget a set's shards; file systems in memory, and some on a network, do not.

    Raises:
        OSError: a shard cannot be opened.
    """
    for number in range(len(shard_set.manifest.shards)):
        handle = os.open(shard_set.path_of(number), os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
