"""What ``maestri eval`` is told of images and models, whatever the protocol."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """What is judged, on which images."""

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, of one of its checkpoints, or a file of weights (with --timm)."""
    train_shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")] = ""
    """Training shards; the run's by default."""
    shards: str = ""
    """The same, as a flag."""
    test_shards: str = ""
    """Test shards; the run's by default."""
    holdout: int | None = None
    """Training images, the last ones, that choices are made on; the run's data.holdout by default, without a run a
    tenth, at most 10,000."""
    timm: str = ""
    """The timm model that a file of weights is of."""
    size: int = 0
    """Height and width of images for a timm model, in pixels; the model's own by default."""
    crop_fraction: float = 0.0
    """Side of the centre crop as a fraction of the shorter side; the run's by default, without a run 0.875."""
    batch_size: int = 0
    """Images per forward pass, on each rank; the run's by default."""
    features: Path | None = None
    """Folder that features are kept in; RUN/features by default."""
    cache: bool = True
    """Whether features are kept, and found again."""
    out: Path | None = None
    """Folder of results; RUN/evaluation by default."""
    seed: int = 0
    """Of low-shot splits, of the order of images in linear probes, and of k-means."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where features are computed, and k-NN and linear probes."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        if self.holdout is not None and self.holdout < 0:
            raise ValueError(f"holdout is {self.holdout}; it must be at least 0")
        if not 0 <= self.crop_fraction <= 1:
            raise ValueError(f"crop-fraction is {self.crop_fraction}; it must lie in (0, 1]")
        if self.batch_size < 0 or self.size < 0:
            raise ValueError(f"batch-size is {self.batch_size} and size {self.size}; neither may be below 0")
        if self.shards and self.train_shards and self.shards != self.train_shards:
            raise ValueError(f"training shards are {self.train_shards} and {self.shards}; give one of them")


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnFlags:
    """k-NN's settings."""

    k: tuple[int, ...] = ()
    """Numbers of neighbours; the run's own by default, without a run 10 and 20."""
