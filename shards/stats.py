"""What a set looks like in numbers, from its index; the channels' mean and deviation from a sample of its pixels."""

import io
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maestri.shards.images import FIXED, FORMATS, KEPT, LOSSLESS, MENDED, RESIZED, TRANSCODED
from maestri.shards.index import wrong_label
from maestri.shards.plan import shuffled
from maestri.shards.shard_set import ShardError, ShardSet

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
NUM_EXTREMES = 5
NUM_SHOWN = 20
STORED = {
    KEPT: "kept", TRANSCODED: "transcoded", MENDED: "end marker added", FIXED: "fixed", LOSSLESS: "lossless",
    RESIZED: "resized",
}  # fmt: skip
_BATCH = 64


def stats(shard_set: ShardSet, *, num_pixels: int = 0, seed: int = 0, workers: int = 1) -> dict[str, Any]:
    """Returns everything in plain numbers, ready for JSON.

    Args:
        shard_set: the set.
        num_pixels: images to decode for mean and deviation; 0 for none.
        seed: which images those are.
        workers: threads that decode.

    Raises:
        ShardError: the set has no images, or a label that is none of its classes.
    """
    columns = shard_set.columns
    if not len(shard_set):
        raise ShardError(f"{shard_set.folder} has no images")
    if problem := wrong_label(columns, len(shard_set.manifest.class_names)):
        raise ShardError(f"{shard_set.folder}: row {problem[0]} of the index: {problem[1]}")
    width, height = columns.width.astype(np.float64), columns.height.astype(np.float64)
    found: dict[str, Any] = {
        "images": len(shard_set),
        "bytes": int(columns.bytes.sum(dtype=np.int64)),
        "classes": _classes(shard_set),
        "width": _percentiles(width),
        "height": _percentiles(height),
        "aspect": _percentiles(width / np.maximum(height, 1)),
        "megapixels": _percentiles(width * height / 1e6),
        "bytes_per_image": _percentiles(columns.bytes),
        "stored": {STORED.get(code, str(code)): count for code, count in _counts(columns.stored)},
        "orientations": {str(code): count for code, count in _counts(columns.orientation)},
        "duplicates": duplicates(shard_set),
    }
    if num_pixels:
        found["pixels"] = pixel_stats(shard_set, num_images=num_pixels, seed=seed, workers=workers)
    return found


def duplicates(shard_set: ShardSet) -> dict[str, Any]:
    """Returns images with the same bytes (by CRC-32 and size), and which of them differ in their labels.

    Two different images agree in both by chance about once in 4 billion pairs of the same size.
    """
    columns = shard_set.columns
    order = np.lexsort((columns.bytes, columns.crc32))
    checksums, sizes = columns.crc32[order], columns.bytes[order]
    is_new = np.ones(len(order), np.bool_)
    is_new[1:] = (checksums[1:] != checksums[:-1]) | (sizes[1:] != sizes[:-1])
    starts = np.flatnonzero(is_new)
    ends = np.append(starts[1:], len(order))
    groups = [np.sort(order[starts[at] : ends[at]]).tolist() for at in np.flatnonzero(ends - starts > 1)]
    groups.sort()
    differing = [rows for rows in groups if len({tuple(sorted(shard_set.labels_of(row))) for row in rows}) > 1]
    return {
        "groups": len(groups),
        "surplus_images": sum(len(rows) - 1 for rows in groups),
        "groups_with_differing_labels": len(differing),
        "first": [[shard_set.key(row) for row in rows] for rows in groups[:NUM_SHOWN]],
        "first_with_differing_labels": [
            {shard_set.key(row): _names(shard_set, row) for row in rows} for rows in differing[:NUM_SHOWN]
        ],
    }


def pixel_stats(shard_set: ShardSet, *, num_images: int, seed: int, workers: int) -> dict[str, Any]:
    """Returns mean and standard deviation of each channel over all pixels of random images, 0–1; grey counts as RGB."""
    rows = shuffled(len(shard_set), seed)[:num_images]
    sums, lock = np.zeros((2, 3), np.float64), threading.Lock()
    num_values = 0

    def add(batch: NDArray[np.int64]) -> None:
        nonlocal sums, num_values
        for data in shard_set.read_checked(batch):
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                pixels = np.asarray(image.convert("RGB"), np.float32).reshape(-1, 3) / 255
            found = np.stack([pixels.sum(0, dtype=np.float64), np.square(pixels).sum(0, dtype=np.float64)])
            with lock:
                sums += found
                num_values += len(pixels)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(add, np.array_split(rows, max(1, len(rows) // _BATCH))))
    mean = sums[0] / num_values
    deviation = np.sqrt(np.maximum(sums[1] / num_values - mean**2, 0))
    return {"images": len(rows), "mean": mean.round(6).tolist(), "std": deviation.round(6).tolist()}


def _classes(shard_set: ShardSet) -> dict[str, Any]:
    names = shard_set.manifest.class_names
    if not names:
        return {"number": 0}
    columns = shard_set.columns
    labels = columns.label if columns.label_values is None else columns.label_values
    counts = np.bincount(labels[labels >= 0], minlength=len(names))
    order = np.argsort(counts, kind="stable")
    return {
        "number": len(names),
        "without_label": int((columns.label < 0).sum()),
        "min": int(counts.min()),
        "median": float(np.median(counts)),
        "max": int(counts.max()),
        "smallest": _counted(names, counts, order[:NUM_EXTREMES]),
        "largest": _counted(names, counts, order[::-1][:NUM_EXTREMES]),
    }


def _counted(names: Sequence[str], counts: NDArray[np.int64], which: NDArray[np.int64]) -> dict[str, int]:
    return {names[at]: int(counts[at]) for at in which.tolist()}


def _counts(values: NDArray[Any]) -> list[tuple[int, int]]:
    counts = np.bincount(values)
    return [(code, int(counts[code])) for code in np.flatnonzero(counts).tolist()]


def _percentiles(values: NDArray[Any]) -> dict[str, float]:
    found = np.percentile(values, PERCENTILES)
    return {str(name): round(float(value), 4) for name, value in zip(PERCENTILES, found, strict=True)}


def _names(shard_set: ShardSet, row: int) -> list[str]:
    return [shard_set.manifest.class_names[label] for label in shard_set.labels_of(row)]
