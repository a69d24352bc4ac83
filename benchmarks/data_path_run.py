"""One measurement of ``data_path.py`` in a process of its own: a job as JSON in, a line of JSON out.

After the line it goes on making batches until it is ended, so that its memory can be read from outside while no time
is taken.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

MARK = "RESULT "
"""Before the line of JSON, as libraries print, too."""
_LOOKED_AT = 4
"""Batches whose shapes, type and mean are checked."""


def main() -> None:
    """Measures, and goes on for ever."""
    request = json.loads(sys.argv[1])
    sys.path.extend(request.pop("python_path"))
    from data_path_job import BATCH, Job  # after the path
    from data_path_peers import PEERS

    peer, warm_up, num_batches = PEERS[request.pop("peer")], request.pop("warm_up"), request.pop("batches")
    folders = {name: Path(request.pop(name)) for name in ("photos", "tars", "beton")}
    job = Job(**folders, **request)
    run = peer.start(job)
    for _ in range(warm_up):
        next(run.batches)
    stages, read, cpu, began = run.stage_seconds(), bytes_read(), cpu_seconds(), time.perf_counter()
    for _ in range(num_batches):
        next(run.batches)
    seconds = time.perf_counter() - began
    result: dict[str, Any] = {"images_per_second": num_batches * BATCH / seconds}
    result["cpu_us"] = (cpu_seconds() - cpu) / num_batches / BATCH * 1e6
    result["disk_mb"] = (bytes_read() - read) / 1e6
    result["stage_us"] = {
        name: (total - stages.get(name, 0.0)) / num_batches / BATCH * 1e6 for name, total in run.stage_seconds().items()
    }
    # Only now: while a batch is looked at, the next ones would be finished, and be counted as if they took no time.
    sizes = [size for size, _ in job.views]
    result["mean_level"] = statistics.mean(mean_level(next(run.batches), sizes, BATCH) for _ in range(_LOOKED_AT))
    print(MARK + json.dumps(result), flush=True)
    while True:
        next(run.batches)


def mean_level(batch: list[Any], sizes: list[int], batch_size: int) -> float:
    """Returns the mean over all pixels; the batch must be uint8, with the right views."""
    import torch

    found: list[int] = []
    total = 0.0
    for pixels in map(torch.as_tensor, batch):
        assert pixels.dtype == torch.uint8, pixels.dtype
        channels = [axis for axis in (-3, -1) if pixels.shape[axis] == 3]
        assert len(channels) == 1, pixels.shape
        height, width = [length for length in pixels.shape[-3:] if length != 3]
        assert height == width, pixels.shape
        found += [height] * (pixels.numel() // (3 * height * width))
        total += pixels.double().mean().item() / len(batch)
    expected = [size for size in sizes for _ in range(batch_size)]
    assert sorted(found) == sorted(expected), f"{len(found)} views, expected {len(expected)}"
    return total


def cpu_seconds() -> float:
    """Returns the processor time of this session's processes so far, with children that have ended."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[3]) == os.getsid(0):
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def bytes_read() -> int:
    """Returns the bytes that this process has had read from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


if __name__ == "__main__":
    main()
