"""How much memory a run will need on each rank, by owner, and what fits: worked out before any device is there."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from maestri.engine.config import RunConfig
from maestri.engine.start import COMPUTE_DTYPES, check_slices
from maestri.model.method import Method
from maestri.profiler.plan_kept import PERSISTENT_ELEMENTS, KeptBytes, Layout, kept_bytes
from maestri.profiler.plan_step import StepNeeds, method_on_meta, plans_for_cpu, step_flops, step_needs

STAGES = (0, 1, 2, 3)
PREFETCH_ELEMENTS = 50_000_000
"""ZeRO 3: of parameters that are gathered ahead of their use."""
MOST_IMAGES = 1 << 20
"""Of a rank's micro-batch; more is not looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Allowance:
    """What cannot be worked out, and is assumed."""

    context_bytes: int
    """Of the CUDA context, libraries' workspaces and NCCL's buffers."""
    fragmentation: float
    """Memory that the allocator holds beyond what is in use, as a fraction of what a step allocates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """Memory of one rank at one ZeRO stage."""

    stage: int
    """ZeRO's."""
    kept: Mapping[str, int]
    """Bytes between steps on the device, by owner."""
    host: Mapping[str, int]
    """Bytes between steps on the host, by owner: what is offloaded."""
    bucket: int
    """Bytes of the buffer in which gradients are reduced."""
    gradients: int
    """Bytes that wait for the optimizer's step."""
    activations: int
    """Bytes kept for the backward pass."""
    gathered: int
    """Bytes of parameters that ZeRO 3 has whole at once, beside the small ones that always are."""
    step: int
    """The most bytes that a step has at once beside ``kept``, the bucket and batches, ``gathered`` and gradients among
    it."""
    batches: int
    """Bytes of the batch, and of those made ahead."""
    allowance: int
    """Bytes assumed: context, libraries and fragmentation."""
    largest_batch: int
    """Images of the largest micro-batch on a rank that fits; 0: none does."""

    @property
    def measurable(self) -> int:
        """The most bytes in use at once, without what is assumed."""
        return sum(self.kept.values()) + self.bucket + self.step + self.batches

    @property
    def total(self) -> int:
        """Bytes of a device that the run needs."""
        return self.measurable + self.allowance


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """What a recipe will need."""

    title: str
    """Method, ranks, precision and device."""
    images: int
    """Of a rank's micro-batch."""
    world_size: int
    """Ranks."""
    limit: int
    """Bytes of a device."""
    allowance: Allowance
    """What is assumed."""
    stages: Sequence[StagePlan]
    """In the order asked for."""
    flops_per_image: Mapping[str, float]
    """Of a training step, by part, forward and backward."""

    def verdict(self) -> str:
        """Returns what it comes to, as a sentence."""
        fitting = [plan for plan in self.stages if plan.total <= self.limit]
        limit = f"{self.limit / 2**30:g} GiB"
        micro = f"{self.images:,} images a rank"
        if fitting:
            chosen = fitting[0]
            return (
                f"ZeRO {chosen.stage} holds {micro} in {chosen.total / 2**30:.1f} of {limit}; "
                f"it would hold {chosen.largest_batch:,}."
            )
        best = max(self.stages, key=lambda plan: plan.largest_batch)
        if best.largest_batch:
            return (
                f"No stage asked for holds {micro} in {limit}; ZeRO {best.stage} holds {best.largest_batch:,}: "
                "raise batch.accumulation, or set engine.activation_checkpointing."
            )
        return (
            f"No stage asked for holds even one image a rank in {limit}: more ranks, engine.offload or a smaller model."
        )

    def as_json(self) -> dict[str, Any]:
        """Returns everything as plain values, with totals."""
        found = asdict(self)
        for values, plan in zip(found["stages"], self.stages, strict=True):
            values |= {"measurable": plan.measurable, "total": plan.total, "fits": plan.total <= self.limit}
        return found | {"verdict": self.verdict()}


class Forecast:
    """What a recipe's steps need, at any size of its batch."""

    def __init__(self, config: RunConfig, world_size: int) -> None:
        """Builds the model without weights."""
        self.config = config
        self.world_size = world_size
        self.method: Method = method_on_meta(config)
        self._needs: dict[int, StepNeeds] = {}

    def needs(self, images: int) -> StepNeeds:
        """Returns what a micro-batch of so many images on a rank needs."""
        if images not in self._needs:
            self._needs[images] = step_needs(self.config, self.method, images=images, world_size=self.world_size)
        return self._needs[images]

    @property
    def sizes(self) -> Collection[int]:
        """Images of the micro-batches that were looked at."""
        return self._needs.keys()

    def stage_plan(self, stage: int, images: int, allowance: Allowance) -> StagePlan:
        """Returns memory at a ZeRO stage; ``largest_batch`` is left at 0."""
        config, needs = self.config, self.needs(images)
        layout = Layout(
            stage=stage,
            world_size=self.world_size,
            itemsize=COMPUTE_DTYPES[config.engine.precision].itemsize,
            offloads=config.engine.offload == "optimizer",
            on_gpu=not plans_for_cpu(config),
            accumulates=config.batch.accumulation > 1,
        )
        kept = kept_bytes(self.method, config.optimizer, layout)
        gathered = self._gathered_bytes(needs, layout)
        step = _most_in_step(needs, kept, gathered, layout)
        return StagePlan(
            stage=stage,
            kept=kept.device,
            host=kept.host,
            bucket=kept.bucket,
            gradients=kept.gradients,
            activations=needs.activation_bytes,
            gathered=gathered,
            step=step,
            batches=(1 + config.data.prefetch) * needs.batch_bytes,
            allowance=allowance.context_bytes + round(allowance.fragmentation * step),
            largest_batch=0,
        )

    def _gathered_bytes(self, needs: StepNeeds, layout: Layout) -> int:
        """Returns bytes of parameters that are whole at once.

        A linear layer's weight stays whole until its backward pass: autograd refers to it, transposed.
        """
        if layout.stage != 3 or layout.world_size == 1:
            return 0
        sizes = [parameter.numel() for parameter in self.method.student.parameters()]
        divided = layout.itemsize * sum(size for size in sizes if size > PERSISTENT_ELEMENTS)
        return min(divided, needs.saved_parameter_bytes + layout.itemsize * PREFETCH_ELEMENTS)


def _most_in_step(needs: StepNeeds, kept: KeptBytes, gathered: int, layout: Layout) -> int:
    """Returns bytes: those of forward and backward pass, or those of the optimizer's step, whichever are more."""
    if layout.stage == 3:  # gradients have a place of their own
        return kept.gradients + max(needs.peak_bytes + gathered, kept.widened)
    if layout.stage == 0 and not layout.accumulates:
        return max(needs.peak_with_gradients_bytes, kept.gradients + kept.widened)
    # The bucket is made as the backward pass begins.
    in_backward = max(needs.peak_bytes - kept.bucket, needs.backward_peak_bytes)
    return max(in_backward + kept.accumulated, kept.gradients + kept.widened)


def make_plan(
    config: RunConfig, *, world_size: int, stages: Sequence[int], limit: int, allowance: Allowance
) -> MemoryPlan:
    """Returns what a recipe will need on so many ranks, at each ZeRO stage.

    Args:
        config: the recipe's; of ``engine``, ``zero_stage`` is not looked at.
        world_size: ranks.
        stages: of ZeRO.
        limit: bytes of a device.
        allowance: what is assumed.

    Raises:
        ValueError: ranks would get different numbers of images, or a stage cannot be had with these settings.
    """
    check_slices(config.batch, world_size)
    for stage in stages:
        replace(config.engine, zero_stage=stage)
    forecast = Forecast(config, world_size)
    images = config.batch.micro_size // world_size
    plans = []
    for stage in stages:

        def total(size: int, stage: int = stage) -> int:
            return forecast.stage_plan(stage, size, allowance).total

        largest = _largest(total, limit, {images, 2 * images, *forecast.sizes})
        plans.append(replace(forecast.stage_plan(stage, images, allowance), largest_batch=largest))
    flops = step_flops(config, forecast.method, images=images, world_size=world_size)
    device = "cpu" if plans_for_cpu(config) else "gpu"
    return MemoryPlan(
        title=f"{config.method.name}, {world_size} × {device}, {config.engine.precision}",
        images=images,
        world_size=world_size,
        limit=limit,
        allowance=allowance,
        stages=plans,
        flops_per_image={part: count / images for part, count in flops.items()},
    )


def _largest(total: Callable[[int], int], limit: int, tried: Collection[int]) -> int:
    """Returns about the most images whose total is within the limit: a size that was tried, short of it by 1 % at most.

    Totals grow all but linearly, so the next size is where the line through two tried ones meets the limit.

    Args:
        total: bytes of so many images.
        limit: bytes.
        tried: at least two sizes to start from.
    """
    totals = {size: total(size) for size in tried}
    while True:
        fits = max((size for size, found in totals.items() if found <= limit), default=0)
        fails = min((size for size, found in totals.items() if found > limit), default=MOST_IMAGES + 1)
        first, last = sorted(sorted(totals, key=lambda size: abs(totals[size] - limit))[:2])
        per_image = max(1.0, (totals[last] - totals[first]) / (last - first))
        size = min(max(int(first + (limit - totals[first]) / per_image), fits + 1), fails - 1)
        if size - fits <= fits // 100 or fails - fits <= 1:
            return fits
        totals[size] = total(size)
