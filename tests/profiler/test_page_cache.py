"""What of a data set lies in the page cache."""

import mmap
import os
from pathlib import Path

from small_run import write_shards

from maestri.profiler.page_cache import bytes_in_page_cache, drop_from_page_cache
from maestri.shards.shard_set import ShardSet


def test_bytes_in_page_cache__what_was_read_and_not_what_was_dropped(tmp_path: Path) -> None:
    write_shards(tmp_path)
    with ShardSet.open(tmp_path / "shards") as shards:
        paths = [shards.path_of(number) for number in range(len(shards.manifest.shards))]
        pages = sum(-(-path.stat().st_size // mmap.PAGESIZE) for path in paths)
        for path in paths:
            with path.open("rb") as file:
                os.fsync(file.fileno())  # what is not yet written cannot be dropped
                file.read()
        assert bytes_in_page_cache(shards) == pages * mmap.PAGESIZE
        drop_from_page_cache(shards)
        assert bytes_in_page_cache(shards) < pages * mmap.PAGESIZE
