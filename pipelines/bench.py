"""How fast the data path is alone, beside the fastest that the same cores could decode."""

import itertools
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maestri.pipelines.config import DataConfig
from maestri.pipelines.executor import choose_executor
from maestri.pipelines.loader import Loader
from maestri.pipelines.pixel_ops import PixelOps
from maestri.pipelines.views import ViewsConfig
from maestri.shards.shard_set import ShardSet

_WARM_UP = 3
"""Batches that aren't counted: threads start, queues fill, pages are first touched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What was measured of the loader alone."""

    executor: str
    """``dali`` or ``threads``."""
    num_threads: int
    """Of the executor."""
    read_threads: int
    """That read from shards."""
    prefetch: int
    """Batches under way."""
    images: int
    """Images measured."""
    images_per_second: float
    """Median over rounds."""
    megabytes_per_second: float
    """Stored bytes, 10⁶ a second."""
    images_per_core_second: float
    """Images per second of processor time of the whole process, whatever runs beside it."""
    batch_ms: dict[str, float]
    """Time from one batch to the next: ``p50``, ``p90`` and ``p99``, milliseconds."""
    stage_us: dict[str, float]
    """Microseconds per image in each stage, summed over its threads; waiting for others included."""
    decode_limit: float
    """Images per second that libjpeg-turbo alone decodes on as many threads, in the same rounds; 0: not measured."""
    batch_bytes: int
    """Memory of a batch on the device."""

    def as_json(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        return asdict(self)


def measure(
    shard_set: ShardSet,
    *,
    config: DataConfig,
    views: ViewsConfig,
    patch: int,
    batch_size: int,
    device: torch.device,
    batches: int,
    rounds: int,
    with_limit: bool = True,
    seed: int = 0,
    on_batch: Callable[[], None] = lambda: None,
) -> Bench:
    """Returns what the loader does when nothing else is asked of it.

    Rounds of the loader and of decoding alone take turns, so that what disturbs the machine disturbs both.

    Args:
        shard_set: the samples.
        config: how they are read.
        views: what is done to them.
        patch: side of a token in pixels.
        batch_size: samples per batch.
        device: where batches are wanted.
        batches: per round.
        rounds: of which the median counts.
        with_limit: whether decoding alone is measured, too.
        seed: of order, views and masks.
        on_batch: called after each batch.
    """
    speeds, limits, gaps, cpu_seconds = [], [], [], 0.0
    stages: dict[str, float] = {}
    rows: list[NDArray[np.int64]] = []
    with Loader(
        shard_set,
        config=config,
        views=views,
        patch=patch,
        seed=seed,
        rank=0,
        world_size=1,
        global_size=batch_size,
        device=device,
    ) as loader:
        for _ in range(_WARM_UP):
            batch = next(loader)
        batch_bytes = sum(tensor.nbytes for tensor in _tensors(batch.views)) + sum(
            tensor.nbytes
            for mapping in (batch.token_mask, batch.visible, batch.masked, batch.pixel_mask)
            for tensor in _tensors(mapping)
        )
        for _ in range(rounds):
            before, began, cpu = loader.stages.seconds(), time.perf_counter(), time.process_time()
            last = began
            for _ in range(batches):
                batch = next(loader)
                _wait_for(device)
                now = time.perf_counter()
                gaps.append(now - last)
                last = now
                rows.append(batch.rows.cpu().numpy())
                on_batch()
            speeds.append(batches * batch_size / (last - began))
            cpu_seconds += time.process_time() - cpu
            for name, seconds in loader.stages.seconds().items():
                stages[name] = stages.get(name, 0.0) + seconds - before.get(name, 0.0)
            if with_limit:
                some = np.concatenate(rows[-min(batches, 8) :])
                limits.append(decode_limit(shard_set, some, num_threads=config.num_threads))
                # What the loader has made in the meantime doesn't count.
                for _ in range(config.prefetch + _WARM_UP):
                    next(loader)
    num_images = rounds * batches * batch_size
    speed = statistics.median(speeds)
    mean_bytes = float(np.mean([shard_set.columns.bytes[part].mean() for part in rows]))
    return Bench(
        executor=choose_executor(config.executor, device),
        num_threads=config.num_threads,
        read_threads=config.read_threads,
        prefetch=config.prefetch,
        images=num_images,
        images_per_second=speed,
        megabytes_per_second=speed * mean_bytes / 1e6,
        images_per_core_second=num_images / cpu_seconds,
        batch_ms={f"p{q}": float(np.percentile(gaps, q)) * 1e3 for q in (50, 90, 99)},
        stage_us={name: seconds / num_images * 1e6 for name, seconds in stages.items()},
        decode_limit=statistics.median(limits) if limits else 0.0,
        batch_bytes=batch_bytes,
    )


def decode_limit(shard_set: ShardSet, rows: NDArray[np.int64], *, num_threads: int) -> float:
    """Returns the images per second that libjpeg-turbo alone decodes, bytes in memory, nothing done to the pixels."""
    columns = shard_set.columns
    work = [
        (np.frombuffer(data, np.uint8), int(columns.width[row]), int(columns.height[row]))
        for row, data in zip(rows, shard_set.read_checked(rows), strict=True)
    ]

    def decode(part: list[tuple[NDArray[np.uint8], int, int]]) -> None:
        ops = PixelOps("linear", True)
        for data, width, height in part:
            ops.decode(data, width, height)

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(decode, [work[:2]] * num_threads))
        began = time.perf_counter()
        list(pool.map(decode, [work[number::num_threads] for number in range(num_threads)]))
        return len(work) / (time.perf_counter() - began)


def tune(
    config: DataConfig, device: torch.device, measure_one: Callable[[DataConfig], Bench]
) -> tuple[DataConfig, list[tuple[str, Any, Bench]]]:
    """Returns the fastest settings found, and all that was tried: setting, value, result.

    One setting after the other is tried over its values, with the best so far of those before it; a later value wins
    only if it is 2 % faster, so that threads and memory are not spent on noise.

    Args:
        config: where to start.
        device: where batches are wanted.
        measure_one: returns what a configuration does.
    """
    cores = len(os.sched_getaffinity(0))
    threads = sorted({*itertools.takewhile(lambda number: number <= cores, (2**n for n in range(10))), cores})
    settings: list[tuple[str, list[Any]]] = [
        ("num_threads", threads),
        ("prefetch", [1, 2, 4]),
        ("read_threads", [1, 4]),
    ]
    if choose_executor(config.executor, device) == "dali" and device.type == "cuda":
        settings.append(("hardware_decoder", [0.0, 0.35, 0.5, 0.65, 0.8, 1.0]))
    best, best_speed, tried = config, 0.0, []
    for name, values in settings:
        start, best_speed = best, 0.0
        for value in values:
            candidate = replace(start, **{name: value})
            result = measure_one(candidate)
            tried.append((name, value, result))
            if result.images_per_second > 1.02 * best_speed:
                best, best_speed = candidate, result.images_per_second
    return best, tried


def _tensors(mapping: Any) -> list[Tensor]:
    return list(mapping.values())


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
