"""How long a set takes to open, by its size: ``python benchmarks/open_index.py SCRATCH``.

Sets are synthetic: index and shards are files with holes, as large as they would be at 107 KB an image and shards
of 256 MiB.  Each is opened in a fresh process, after its imports, and its last row is looked up.  Medians of 7.
"""

import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from maestri.shards import index
from maestri.shards.manifest import Manifest, ShardInfo

ROUNDS = 7
IMAGE_BYTES, SHARD_BYTES, KEY_BYTES = 107_000, 256 * 2**20, 24
AIMS = {1_300_000: 50, 100_000_000: 500}
"""Rows → milliseconds."""
OPEN = """
import sys, time
import numpy as np
from maestri.shards.shard_set import ShardSet
start = time.perf_counter()
with ShardSet.open(sys.argv[1]) as shard_set:
    size = int(shard_set.columns.bytes[len(shard_set) - 1])
print(time.perf_counter() - start)
status = open("/proc/self/status").read()
print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
"""


def make(folder: Path, num_rows: int) -> None:
    """Writes a set of so many rows."""
    folder.mkdir()
    layout = index.layout_of(num_rows, key_bytes=KEY_BYTES * num_rows)
    index.IndexDraft(folder / index.FILE_NAME, num_rows, layout).close()
    per_shard = SHARD_BYTES // IMAGE_BYTES
    shards = []
    for number, first in enumerate(range(0, num_rows, per_shard)):
        name = f"shard-{number:05d}.tar"
        (folder / name).touch()
        count = min(per_shard, num_rows - first)
        shards.append(ShardInfo(name=name, bytes=SHARD_BYTES, num_samples=count, xxh128="0" * 32))
    Manifest(
        source={"kind": "folder", "name": "synthetic"}, format="tar", labels="class",
        class_names=tuple(f"n{number:08d}" for number in range(1000)), num_samples=num_rows, num_quarantined=0,
        images={}, seed=0, shards=tuple(shards), recipe="0" * 64,
        index={"bytes": (folder / index.FILE_NAME).stat().st_size, "xxh128": "0" * 32, "columns": layout},
    ).write(folder)  # fmt: skip


def main() -> int:
    """Returns the exit code: 1 if an aim was missed."""
    scratch = Path(sys.argv[1]) / "open_index"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    print("| rows | shards | aim, ms | median, ms | all, ms | peak memory, MB |\n|---:|---:|---:|---:|---|---:|")
    missed = False
    for num_rows, aim in AIMS.items():
        folder = scratch / str(num_rows)
        make(folder, num_rows)
        command = [sys.executable, "-c", OPEN, str(folder)]
        outputs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(ROUNDS)]
        found = sorted(1000 * float(output.split()[0]) for output in outputs)
        peak = max(float(output.split()[1]) for output in outputs)
        median = statistics.median(found)
        missed |= median > aim
        listed = ", ".join(f"{value:.0f}" for value in found)
        num_shards = len(list(folder.glob("*.tar")))
        print(f"| {num_rows:,} | {num_shards:,} | {aim} | {median:.0f} | {listed} | {peak:.0f} |")
    shutil.rmtree(scratch)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
