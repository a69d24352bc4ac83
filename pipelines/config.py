"""Where the samples come from and how they are read."""

from dataclasses import dataclass, field
from typing import Literal

from maestri.pipelines.order import OrderConfig
from maestri.pipelines.selection import SelectionConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The data set and its loader."""

    shards: str
    """Folder of shards to train on."""
    test_shards: str = ""
    """Folder of shards to test on; empty: none."""
    holdout: int = 0
    """Samples at the end of ``shards`` that are never trained on; rows are shuffled, so they are a random subset."""
    select: SelectionConfig = field(default_factory=SelectionConfig)
    """Which of the other samples are trained on; all by default."""
    order: OrderConfig = field(default_factory=OrderConfig)
    """How samples are shuffled."""
    executor: Literal["auto", "dali", "threads"] = "auto"
    """What decodes and makes the views: ``dali`` on the run's device, ``threads`` on the CPU; ``auto`` is ``dali`` on a
    GPU and ``threads`` elsewhere."""
    num_threads: int = 2
    """CPU threads per rank for the executor."""
    read_threads: int = 1
    """Threads per rank that read from the shards; more where the storage is slow to answer."""
    hardware_decoder: float = 0.65
    """Share of JPEGs that ``dali`` on a GPU gives to the hardware decoder, where the GPU has one; 0–1."""
    prefetch: int = 2
    """Batches made ahead of the training step."""
    max_bad: int = 100
    """Different bad samples, per rank, that are replaced and logged before the run stops."""
    timeout: float = 600.0
    """Seconds without a batch before the run stops and names what the data path is stuck at; 0 waits for ever."""

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ValueError: a field is out of range.
        """
        smallest = {"holdout": 0, "num_threads": 1, "read_threads": 1, "prefetch": 1, "max_bad": 0, "timeout": 0}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}; expected at least {least}")
        if not 0 <= self.hardware_decoder <= 1:
            raise ValueError(f"data.hardware_decoder is {self.hardware_decoder}; expected a share, 0 to 1")
