"""Where the samples come from and how they are read."""

from dataclasses import dataclass, field
from typing import Literal

from maestri.pipelines.order import OrderConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The data set and its loader."""

    shards: str
    """Folder of shards to train on."""
    test_shards: str = ""
    """Folder of shards to test on; empty: none."""
    holdout: int = 0
    """Samples at the end of ``shards`` that are never trained on; rows are shuffled, so they are a random subset."""
    order: OrderConfig = field(default_factory=OrderConfig)
    """How samples are shuffled."""
    executor: Literal["dali"] = "dali"
    """What decodes and cuts the views; the device it runs on is the run's."""
    num_threads: int = 2
    """CPU threads per rank for the executor."""
    prefetch: int = 2
    """Batches made ahead of the training step."""
    max_bad: int = 100
    """Different bad samples, per rank, that are replaced and logged before the run stops."""

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ValueError: a field is out of range.
        """
        for name, smallest in (("holdout", 0), ("num_threads", 1), ("prefetch", 1), ("max_bad", 0)):
            if getattr(self, name) < smallest:
                raise ValueError(f"data.{name} is {getattr(self, name)}; expected at least {smallest}")
