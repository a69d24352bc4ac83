"""What ``data_path.py`` found, as Markdown."""

import argparse
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_path_job import BATCH, WORKLOADS
from data_path_peers import OURS, PEERS

_PLANNING = ("order", "read", "plan")
"""Stages of our source: what is there for elasticity, and reading and checking with it."""
_WORK = {"single": "one 224 view", "multi": "2 × 224 + 8 × 96"}
_METHOD = f"""\
All do the same work: uint8 batches of {BATCH} from JPEGs drawn at random from all, each view a random resized crop
(area 0.2-1 of the picture, for 96 pixels 0.05-0.25; ratio 3/4-4/3), resized bilinear and antialiased, mirrored in half
of the cases. No masks, colours or normalisation; nothing is done with the batches.

- Each measurement is a process of its own: {{warm_up}} batches that don't count, then {{batches}} that do. A round
  measures all, one after the other; figures are medians over rounds, {{rounds}} in number. All files are in the page
  cache, except where "cold" says otherwise.
- "workers" are threads (ours, DALI, SPDL, ffcv) or processes (DataLoader, webdataset): {{workers}}.
- "of decoding": images/s as a share of libjpeg-turbo alone (torchvision's `decode_image`) in {{threads}} threads, bytes
  in memory, timed just before and just after each measurement; the median of the rounds' shares, so it is not the
  quotient of two medians.
- "per CPU second": images per second of processor time of all the peer's processes, user and system.
- "memory": proportional set sizes of all the peer's processes together, the largest of 8 samples while it goes on;
  pages of a mapped file (ffcv's) count.

What differs, and can't be helped: ffcv's resize is OpenCV's INTER_AREA, and it decodes the picture again for each view,
unless all pictures are of one size ("decoding once"). `spdl.io` is FFmpeg: its own JPEG decoder, and swscale's
bilinear, which widens when shrinking. ffcv runs without `NormalizeImage`, which hangs on the CPU with today's numba.
webdataset draws tars with replacement and shuffles in a buffer of 1000, DALI in one of 1024; DataLoader, SPDL and ffcv
draw from all files, ours from all rows. The others check nothing; ours checks each sample's CRC-32.
"""


def page(
    found: Mapping[Any, Any], options: argparse.Namespace, *, versions: str, num_files: int, minutes: float
) -> str:
    """Returns the page.

    Args:
        found: task → what was measured of it.
        options: of the command.
        versions: of all that is compared.
        num_files: photos.
        minutes: that it took.
    """
    parts = [
        "# The data path beside its peers, on CPU\n",
        "    python tools/write_photos.py PHOTOS\n"
        "    python benchmarks/data_path.py PHOTOS SCRATCH --python-path SPDL\n",
        f"Hardware: {_hardware()}. {versions}. {num_files:,} photos; {minutes:.0f} minutes in all.\n",
        *([f"**{options.note}**\n"] if options.note else []),
        _METHOD.format(
            warm_up=6,
            batches=options.batches,
            rounds=options.rounds,
            threads=options.threads,
            workers=f"{options.workers}, for all"
            if options.workers
            else f"the best of 1 to {options.most_workers} in a short run before, for each peer and each work",
        ),
    ]
    for workload in WORKLOADS:
        rows = [(task, what) for task, what in found.items() if task.workload == workload and what.results]
        if rows:
            parts += [f"## {workload}: {_WORK[workload]}\n", _table(rows, options.threads), _elasticity(rows)]
    extra = _extra(found)
    parts += [extra] if extra else []
    failures = [f"- {task.peer}, {task.workload}: {what.failure}" for task, what in found.items() if what.failure]
    if failures:
        parts += ["Failed:\n", "\n".join(failures) + "\n"]
    means = {
        task: statistics.mean(result["mean_level"] for result in what.results)
        for task, what in found.items()
        if what.results
    }
    if means:
        lowest, highest = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        parts.append(
            f"The mean over all pixels of the first batches after those counted is {means[lowest]:.1f} ({lowest.peer}) "
            f"to {means[highest]:.1f} ({highest.peer}) levels; each has drawn other photos.\n"
        )
    return "\n".join(parts)


def _hardware() -> str:
    """Returns cores, processor and memory."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "unknown",
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores of {model} (a shared virtual machine), {memory:.0f} GiB"


def _table(rows: list[tuple[Any, Any]], threads: int) -> str:
    """Returns the comparison, those nearest to decoding alone first."""
    plain = [(task, what) for task, what in rows if task.interpolation == "linear" and not task.cold]
    limits = [result for _, what in plain for result in what.results]
    limit = statistics.median(result["limit"] for result in limits)
    per_cpu_second = 1e6 / statistics.median(result["limit_cpu_us"] for result in limits)
    lines = [
        "| what | workers | images/s | of decoding | images per CPU second | memory, MB | images/s, each round |",
        "|---|---:|---:|---:|---:|---:|---|",
        f"| decoding only, libjpeg-turbo | {threads} | {limit:,.0f} | 1.00 | {per_cpu_second:,.0f} | | |",
    ]
    for task, what in sorted(plain, key=lambda row: -_share(row[1])):
        each = ", ".join(f"{result['images_per_second']:,.0f}" for result in what.results)
        label = PEERS[task.peer].label
        lines.append(
            f"| {f'**{label}**' if task.peer in OURS else label} | {what.workers} "
            f"| {what.median('images_per_second'):,.0f} | {_share(what):.2f} | {1e6 / what.median('cpu_us'):,.0f} "
            f"| {what.median('memory_mb'):,.0f} | {each} |"
        )
    return "\n".join(lines) + "\n"


def _share(what: Any) -> float:
    """Returns images per second as a share of decoding alone beside it, the median over rounds."""
    return statistics.median(result["images_per_second"] / result["limit"] for result in what.results)


def _elasticity(rows: list[tuple[Any, Any]]) -> str:
    """Returns what a planned order, planned views and checked samples cost."""
    plain = {task.peer: what for task, what in rows if task.interpolation == "linear" and not task.cold}
    lines = []
    if "dali-tar" in plain and "dali-drawing" in plain:
        shares = [
            (ours["images_per_second"] / ours["limit"]) / (own["images_per_second"] / own["limit"])
            for ours, own in zip(plain["dali-tar"].results, plain["dali-drawing"].results, strict=False)
        ]
        each = ", ".join(f"{share:.2f}" for share in shares)
        ratio = statistics.median(shares)
        lines.append(
            f"Order, views and checks planned by us instead of drawn by the same DALI graph: {ratio:.2f} of its speed "
            f"(aim ≥ 0.97; each round {each}), "
            f"{plain['dali-tar'].median('cpu_us') / plain['dali-drawing'].median('cpu_us') - 1:+.1%} processor time."
        )
    for peer in (peer for peer in OURS if peer in plain):
        what = plain[peer]
        stages = {
            name: statistics.median(result["stage_us"].get(name, 0.0) for result in what.results) for name in _PLANNING
        }
        cpu_us = what.median("cpu_us")
        listed = ", ".join(f"{name} {us:,.0f}" for name, us in stages.items())
        lines.append(
            f"{PEERS[peer].label}: {listed} µs an image, of {cpu_us:,.0f} µs of processor time: order and plan are "
            f"{(stages['order'] + stages['plan']) / cpu_us:.1%}, with reading and its check "
            f"{sum(stages.values()) / cpu_us:.1%}."
        )
    return "\n".join(f"- {line}" for line in sorted(lines)) + "\n" if lines else ""


def _extra(found: Mapping[Any, Any]) -> str:
    """Returns our executors with a bicubic resize, and from the disk."""
    lines = []
    for task, what in found.items():
        if task.peer not in OURS or not what.results or (task.interpolation == "linear" and not task.cold):
            continue
        change = "cold" if task.cold else "bicubic"
        read = f"{what.median('disk_mb'):,.0f}"
        lines.append(
            f"| {PEERS[task.peer].label} | {task.workload} | {change} | {what.median('images_per_second'):,.0f} "
            f"| {_share(what):.2f} | {1e6 / what.median('cpu_us'):,.0f} | {read} |"
        )
    if not lines:
        return ""
    head = [
        "## Ours: bicubic, and from the disk\n",
        "Cold: shards are dropped from the page cache (`posix_fadvise`, `DONTNEED`) before the process starts, and "
        "less than an epoch is read, so that each sample comes from the disk; the last column is what did while the "
        "time was taken (0 where SCRATCH is in memory). A virtual machine's disk may be cached by its host.\n",
        "| what | work | | images/s | of decoding | images per CPU second | MB from the disk |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    return "\n".join([*head, *sorted(lines)]) + "\n"
