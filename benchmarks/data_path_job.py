"""What each peer of ``data_path.py`` is to do."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.transforms import v2

BATCH = 128
RATIO = (3 / 4, 4 / 3)
LARGE, SMALL = (0.2, 1.0), (0.05, 0.25)
"""Areas of crops, as fractions of the picture's."""
WORKLOADS = {"single": ((224, LARGE),), "multi": ((224, LARGE),) * 2 + ((96, SMALL),) * 8}
"""Size and area of each view of a sample."""
ENDLESS = 10**6
"""Samples in an epoch, so that none ends while it is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a peer is to do."""

    photos: Path
    """Folder of pictures in class folders."""
    tars: Path
    """The same as our tar shards, with DALI's .idx files."""
    beton: Path
    """The same as one .beton shard."""
    workload: str
    """Key of ``WORKLOADS``."""
    workers: int
    """Threads or processes, whatever the peer has."""
    interpolation: str = "linear"
    """Of the resize; ``cubic`` for our own executors alone."""

    @property
    def views(self) -> tuple[tuple[int, tuple[float, float]], ...]:
        """Size and area of each view."""
        return WORKLOADS[self.workload]

    def tar_files(self) -> list[str]:
        """Returns the paths of the tar shards."""
        return sorted(map(str, self.tars.glob("*.tar")))


class Run:
    """A peer at work: its batches, and what it tells about itself."""

    def __init__(self, batches: Iterator[list[Any]], stage_seconds: Callable[[], dict[str, float]] = dict) -> None:
        """Notes the batches, each a list of pixels by view or group of views, and how long stages have taken so far."""
        self.batches = batches
        self.stage_seconds = stage_seconds


class Crops:
    """Torchvision's views of a picture, a tensor or PIL's."""

    def __init__(self, job: Job) -> None:
        """Makes the transforms."""
        self._views = [
            v2.Compose([v2.RandomResizedCrop(size, scale=scale, ratio=RATIO), v2.RandomHorizontalFlip()])
            for size, scale in job.views
        ]
        self._to_tensor = v2.PILToTensor()

    def __call__(self, picture: Any) -> list[Tensor]:
        """Returns uint8 ``3 height width`` of each view."""
        views = [view(picture) for view in self._views]
        return views if isinstance(picture, Tensor) else [self._to_tensor(view) for view in views]
