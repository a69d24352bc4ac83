"""What an executor of view plans is: encoded samples and plans in, pixels out.

There are two: ``dali`` (one graph for ``gpu`` and ``cpu``) and ``threads`` (a pool on the CPU).  Both carry out the
same plan and draw nothing, so the pixels differ by rounding alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from maestri.pipelines.reader import Samples
from maestri.pipelines.stages import Stages
from maestri.pipelines.views import LOCAL, ViewPlan, ViewsConfig, probabilities_of


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBatch:
    """What an executor is to do: encoded samples and the plan of their views."""

    samples: Samples
    """Checked samples, ``batch``."""
    plan: ViewPlan
    """What is done to each."""
    position: int
    """Global position of the first sample."""


class Source(Protocol):
    """Where an executor gets its work."""

    def plan(self, index: int) -> PlannedBatch | None:
        """Returns the n-th batch's work, or None past the end; called with 0, 1, 2, …, once each."""
        ...

    def replace(self, planned: PlannedBatch, bad: Mapping[int, str]) -> PlannedBatch:
        """Returns the batch with other samples where the decoder failed.

        Args:
            planned: the batch.
            bad: number in the batch → why it can't be decoded.

        Raises:
            TooManyBadSamples: the budget of bad samples is spent.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupShape:
    """What an executor must know of a group of views before the first batch."""

    count: int
    """Views of each sample."""
    size: int
    """Height and width of a view, in pixels."""
    has_colour: bool = False
    """Whether colours are changed."""
    has_blur: bool = False
    """Whether views are blurred."""
    has_solarise: bool = False
    """Whether views are solarised."""


def group_shapes(config: ViewsConfig) -> dict[str, GroupShape]:
    """Returns the shapes of the groups that ``plan_views`` plans, by name."""
    shapes = {}
    for name in config.group_names():
        blurred, solarised = probabilities_of(config, name)
        shapes[name] = GroupShape(
            count=config.local.count if name == LOCAL else config.count,
            size=config.local.size if name == LOCAL else config.size,
            has_colour=config.colour.changes,
            has_blur=bool(blurred.any()),
            has_solarise=bool(solarised.any()),
        )
    return shapes


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorOptions:
    """How an executor works."""

    shapes: Mapping[str, GroupShape]
    """Of the groups of views, in the plan's order."""
    batch_size: int
    """The largest number of samples in a batch."""
    device: torch.device
    """Where the views end up; ``dali`` decodes there, too."""
    interpolation: Literal["linear", "cubic"]
    """Filter of the resize."""
    antialias: bool
    """Whether the filter widens when shrinking."""
    num_threads: int
    """CPU threads."""
    prefetch: int
    """Batches under way ahead of the caller."""
    hardware_decoder: float = 0.65
    """Share of JPEGs for the GPU's hardware decoder, 0–1; ``dali`` on a GPU only."""
    stages: Stages = field(default_factory=Stages)
    """Where it notes what it is at."""


class Executor(Protocol):
    """An iterator of (planned batch, its views), ``prefetch`` batches ahead of its caller.

    Views are uint8 ``view batch 3 height width`` by the name of the group, channels-last in memory; where the plan
    corrupts a group, its corrupted twin stands beside it (``global_corrupted``).
    """

    def __iter__(self) -> "Executor":
        """Returns itself."""
        ...

    def __next__(self) -> tuple[PlannedBatch, dict[str, Tensor]]:
        """Returns the next batch's work, with replaced samples where the decoder failed, and its views."""
        ...

    def close(self) -> None:
        """Ends threads and frees memory; can be called twice.  Views handed out stay valid."""
        ...


class Plans:
    """A source's batches one after the other, for an executor that plans ahead."""

    def __init__(self, source: Source) -> None:
        """Has asked for nothing yet."""
        self._source = source
        self._num_asked = 0
        self._has_ended = False
        self.error: Exception | None = None
        """What ended them: the executor raises it after the batches that were planned before."""

    def next(self) -> PlannedBatch | None:
        """Returns the next batch's work; None from the source's end or exception on."""
        if self._has_ended:
            return None
        planned = None
        try:
            planned = self._source.plan(self._num_asked)
        except Exception as error:
            self.error = error
        self._num_asked += 1
        self._has_ended = planned is None
        return planned


def with_index(device: torch.device) -> torch.device:
    """Returns the device, of CUDA's the current one by its number: which is current is each thread's own matter.

    Raises:
        ValueError: it is neither the CPU nor a CUDA device.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}; the data path runs on cpu or cuda")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def choose_executor(name: Literal["auto", "dali", "threads"], device: torch.device) -> Literal["dali", "threads"]:
    """Returns the executor that ``auto`` stands for on a device: ``dali`` on a GPU, ``threads`` on the CPU."""
    if name == "auto":
        return "dali" if device.type == "cuda" else "threads"
    return name


def executor_class(name: Literal["dali", "threads"]) -> Callable[[Source, ExecutorOptions], Executor]:
    """Returns the class of an executor.

    Raises:
        ValueError: DALI isn't installed.
    """
    if name == "threads":
        from maestri.pipelines.threads import ThreadsExecutor  # only what is used is imported

        return ThreadsExecutor
    try:
        from maestri.pipelines.dali import DaliExecutor
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("nvidia"):
            raise
        raise ValueError(
            "data.executor dali needs NVIDIA DALI, which isn't installed; install maestri[cuda12] or maestri[cuda13], "
            "or take data.executor threads"
        ) from error
    return DaliExecutor
