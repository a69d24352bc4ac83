"""A training step run for its shapes alone, on the ``meta`` device: what it would keep, allocate and compute.

No weight and no activation exists, so that a step of any size takes a second and next to no memory.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from maestri.engine.config import RunConfig
from maestri.engine.spans import span
from maestri.engine.start import COMPUTE_DTYPES, recompute_blocks, use_plain_attention
from maestri.model.build import build_method
from maestri.model.method import Method
from maestri.model.staged import rollback
from maestri.pipelines.batch import Batch
from maestri.profiler.flops import FlopCounter
from maestri.profiler.live_bytes import LiveBytes
from maestri.profiler.parts import parts_of
from maestri.profiler.plan_kept import PERSISTENT_ELEMENTS
from maestri.profiler.resident import resident_batch

META = torch.device("meta")

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True, slots=True)
class StepNeeds:
    """What one micro-batch needs of a rank's device, besides what lies there anyway."""

    images: int
    """Of the micro-batch, on this rank."""
    batch_bytes: int
    """The views, their masks and labels."""
    activation_bytes: int
    """What the forward pass and the loss keep for the backward pass."""
    saved_parameter_bytes: int
    """Of parameters that ZeRO 3 takes apart, which the forward pass and the loss refer to for the backward pass."""
    peak_bytes: int
    """Allocated at most at once, activations among it; without parameters' gradients."""
    backward_peak_bytes: int
    """The same, from the beginning of the backward pass on."""
    peak_with_gradients_bytes: int
    """As ``peak_bytes``, where every gradient stays whole from its making on."""


def method_on_meta(config: RunConfig) -> Method:
    """Returns a method without weights, in its compute dtype, as the engine would prepare it."""
    dtype = COMPUTE_DTYPES[config.engine.precision]
    with META:
        method = build_method(
            config.method, config.encoder, image_size=config.views.size, num_steps=config.steps, seed=config.seed
        )
    if plans_for_cpu(config) and config.engine.precision == "bf16":
        use_plain_attention(method)
    if config.engine.activation_checkpointing:
        recompute_blocks(method)
    method.student.to(dtype).train()
    for teacher in method.teachers.values():
        teacher.module.requires_grad_(False).to(dtype).train(teacher.train_mode)
    # Flags that a step asks for need a value; they say that nothing has to be set up any more.
    for module in method.state.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.dtype == torch.bool and not buffer.ndim:
                module.register_buffer(name, torch.ones((), dtype=torch.bool))
    return method


def plans_for_cpu(config: RunConfig) -> bool:
    """Returns whether a recipe asks for the CPU; ``auto`` is a GPU here, whatever this machine has."""
    return config.engine.device == "cpu"


def step_needs(config: RunConfig, method: Method, *, images: int, world_size: int) -> StepNeeds:
    """Returns what a micro-batch needs.

    Args:
        config: the recipe's.
        method: of ``method_on_meta``; its gradients are gone afterwards.
        images: of the micro-batch, on this rank.
        world_size: ranks.
    """
    batch = batch_on_meta(config, images)
    # Apart from counting FLOPs, which would hold on to parts of the graph.
    with _planned_for(config, world_size), LiveBytes(method, divided_above=PERSISTENT_ELEMENTS) as memory:
        with torch.no_grad():
            targets = method.targets(batch, 0)
        with memory.saving():
            outputs = method.student(batch)
            loss = method.loss(outputs, targets, 0)[0]
        forward_peak = memory.take_peak()
        loss.backward()
    method.student.zero_grad()
    rollback(method.state)
    return StepNeeds(
        images=images,
        batch_bytes=sum(tensor.nbytes for tensor in _tensors_of(batch)),
        activation_bytes=memory.saved,
        saved_parameter_bytes=memory.saved_parameters,
        peak_bytes=max(forward_peak, memory.peak),
        backward_peak_bytes=memory.peak,
        peak_with_gradients_bytes=memory.peak_with_gradients,
    )


def step_flops(config: RunConfig, method: Method, *, images: int, world_size: int) -> dict[str, int]:
    """Returns FLOPs of a micro-batch, by part, forward and backward; arguments are those of ``step_needs``."""
    batch = batch_on_meta(config, images)
    with _planned_for(config, world_size), FlopCounter(parts_of(method)) as counter:
        with span("teachers"), torch.no_grad():
            targets = method.targets(batch, 0)
        with span("student"):
            outputs = method.student(batch)
        with span("loss"):
            loss = method.loss(outputs, targets, 0)[0]
        with span("backward"):
            loss.backward()
    method.student.zero_grad()
    rollback(method.state)
    return counter.by_part


@contextmanager
def _planned_for(config: RunConfig, world_size: int) -> Iterator[None]:
    """Makes a step, inside the block, that of the ranks and the device that are planned for."""
    with _pretended_ranks(world_size), _GivenAttention(_kernel_of(config)):
        yield


def batch_on_meta(config: RunConfig, images: int) -> Batch:
    """Returns a micro-batch of the recipe's views, without pixels."""
    one = resident_batch(
        config.views, patch=config.encoder.patch, seed=0, positions=range(1), device=torch.device("cpu")
    )

    def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.empty((len(tensor), images, *tensor.shape[2:]), dtype=tensor.dtype, device=META)
            for name, tensor in tensors.items()
        }

    return Batch(
        views=widened(one.views),
        token_mask=widened(one.token_mask),
        visible=widened(one.visible),
        masked=widened(one.masked),
        pixel_mask=widened(one.pixel_mask),
        labels=torch.empty(images, dtype=torch.int64, device=META),
        rows=torch.empty(images, dtype=torch.int64, device=META),
        position=0,
    )


def _tensors_of(batch: Batch) -> Iterator[Tensor]:
    for group in (batch.views, batch.token_mask, batch.visible, batch.masked, batch.pixel_mask):
        yield from group.values()
    yield from (batch.labels, batch.rows)


class _GivenAttention(TorchFunctionMode):
    """Makes fused attention, inside its block, a given kernel's; ``meta`` would choose the one that keeps scores."""

    def __init__(self, kernel: Any) -> None:
        super().__init__()
        self._kernel = kernel

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return self._kernel(*arguments[:3])
        return function(*arguments, **(keywords or {}))


def _kernel_of(config: RunConfig) -> Any:
    """Returns attention as PyTorch computes it on the device that is planned for."""
    if plans_for_cpu(config):
        return lambda *tensors: _aten._scaled_dot_product_flash_attention_for_cpu(*tensors)[0]
    if config.engine.precision == "bf16":
        return lambda *tensors: _aten._scaled_dot_product_flash_attention(*tensors)[0]
    return lambda *tensors: _aten._scaled_dot_product_efficient_attention(*tensors, None, True)[0]


@contextmanager
def _pretended_ranks(world_size: int) -> Iterator[None]:
    """Makes this process, inside the block, the first of so many ranks; collectives move nothing."""
    if world_size == 1:
        yield
        return
    from torch.distributed._tools import fake_collectives  # noqa: F401  # collectives on meta
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a plan is made outside of ranks"
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
