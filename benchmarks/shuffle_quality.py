"""How well each sample order shuffles: ``python benchmarks/shuffle_quality.py``.

A data set like ImageNet, as numbers only: 1281 shards of 1000 rows, 1000 classes of 1281.  It is either sorted by
class, as a set of shards that was adopted unshuffled may be, or shuffled, as conversion leaves it.  Means over all full
batches of 256 in three epochs of seed 0, printed as Markdown:

- classes: different classes in a batch;
- shards: different shards in a batch, of which the windowed order opens no more than its window (or two);
- neighbours: samples that have a neighbour in storage, the row before or behind, in their batch, in percent;
- displacement: distance of a row's place in the epoch from its place in storage, in percent of the epoch.
"""

import numpy as np
from numpy.typing import NDArray

from maestri.pipelines.order import Order, OrderConfig

NUM_SHARDS, SHARD_ROWS, NUM_CLASSES, BATCH, EPOCHS = 1281, 1000, 1000, 256, 3
NUM_ROWS = NUM_SHARDS * SHARD_ROWS
WINDOWS = (1, 4, 16, 64)


def distinct(values: NDArray[np.int64]) -> float:
    """Returns the mean number of different values in a batch, of ``batch sample``."""
    ordered = np.sort(values, axis=1)
    return float(1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1).mean())


def neighbours(rows: NDArray[np.int64]) -> float:
    """Returns the share of samples with a row before or behind theirs in the batch, of ``batch sample``."""
    ordered = np.sort(rows, axis=1)
    follows = ordered[:, 1:] - ordered[:, :-1] == 1
    has_one = np.zeros(rows.shape, np.bool_)
    has_one[:, 1:] |= follows
    has_one[:, :-1] |= follows
    return float(has_one.mean())


def measured(order: Order, labels: NDArray[np.int64]) -> tuple[float, float, float, float]:
    """Returns classes, shards, neighbours and displacement, means over epochs."""
    found = []
    for epoch in range(EPOCHS):
        rows = order.rows(np.arange(epoch * NUM_ROWS, (epoch + 1) * NUM_ROWS))
        batches = rows[: NUM_ROWS // BATCH * BATCH].reshape(-1, BATCH)
        displacement = np.abs(rows - np.arange(NUM_ROWS)).mean() / NUM_ROWS
        found.append((distinct(labels[batches]), distinct(batches // SHARD_ROWS), neighbours(batches), displacement))
    classes, shards, near, far = np.mean(found, axis=0).tolist()
    return classes, shards, near, far


def main() -> None:
    """Prints the table."""
    by_class = np.arange(NUM_ROWS) // (NUM_ROWS // NUM_CLASSES)
    storages = {"sorted by class": by_class, "shuffled": np.random.default_rng(0).permutation(by_class)}
    configs = [OrderConfig(kind="windowed", window=window) for window in WINDOWS] + [OrderConfig()]
    print("| storage | order | classes | shards | neighbours, % | displacement, % |\n|---|---|---:|---:|---:|---:|")
    for storage, labels in storages.items():
        for config in configs:
            order = Order(config, num_rows=NUM_ROWS, seed=0, shard_sizes=np.full(NUM_SHARDS, SHARD_ROWS))
            classes, shards, near, far = measured(order, labels)
            name = f"windowed, {config.window}" if config.kind == "windowed" else "full"
            print(f"| {storage} | {name} | {classes:.1f} | {shards:.1f} | {100 * near:.2f} | {100 * far:.1f} |")


if __name__ == "__main__":
    main()
