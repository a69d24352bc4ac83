"""From a method to a DeepSpeed engine with its teachers."""

from typing import Any

import torch
from timm.models.vision_transformer import Block

from maestri.engine.config import BatchConfig, EngineConfig, OptimizerConfig
from maestri.engine.deepspeed_config import deepspeed_config
from maestri.engine.distributed import Ranks
from maestri.engine.masters import MasterGroup, masters_of, start_moments
from maestri.engine.parameter_groups import parameter_groups
from maestri.engine.teachers import Teachers, prepare_teachers
from maestri.model.method import Method
from maestri.pipelines.order import slice_of

COMPILED_VARIANTS = 64
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def start_engine(
    method: Method, ranks: Ranks, *, batch: BatchConfig, optimizer: OptimizerConfig, engine: EngineConfig
) -> tuple[Any, Teachers, list[MasterGroup]]:
    """Returns DeepSpeed's engine around the student, the teachers, and the student's float32 masters.

    Raises:
        ValueError: ranks would get different numbers of images.
    """
    import deepspeed

    check_slices(batch, ranks.world_size)
    if ranks.device.type == "cpu" and engine.precision == "bf16":
        use_plain_attention(method)
    if engine.activation_checkpointing:
        recompute_blocks(method)
    prepare_teachers(method, device=ranks.device, dtype=COMPUTE_DTYPES[engine.precision])
    method.state.to(ranks.device)
    wrapped, *_ = deepspeed.initialize(
        model=method.student,
        model_parameters=parameter_groups(method, optimizer),
        config=deepspeed_config(
            batch=batch,
            optimizer=optimizer,
            engine=engine,
            num_trained=sum(p.numel() for p in method.student.parameters() if p.requires_grad),
            world_size=ranks.world_size,
            on_gpu=ranks.device.type == "cuda",
        ),
        dist_init_required=False,
    )
    groups = masters_of(wrapped)
    start_moments(wrapped, groups)
    if engine.compile:
        _compile_blocks(method)
    return wrapped, Teachers(method, wrapped.module, groups), groups


def use_plain_attention(method: Method) -> None:
    """Makes the student's attention matrix products and a softmax, instead of PyTorch's fused kernel.

    On a CPU in bf16 the backward pass of that one is slow: a block of width 128 takes 1.9 times as long, forward and
    back, over 65 tokens, and 2.1 times over 17 (PyTorch 2.15, one core with AVX512-BF16).
    """
    module: Any
    for module in method.student.modules():
        if hasattr(module, "fused_attn"):  # timm's attention, in every version
            module.fused_attn = False


def recompute_blocks(method: Method) -> None:
    """Lets the student's encoder and decoder run their blocks again in the backward pass."""
    module: Any
    for module in method.student.modules():
        if hasattr(module, "grad_checkpointing"):  # timm's name
            module.grad_checkpointing = True


def _compile_blocks(method: Method) -> None:
    """Compiles the blocks of student and teachers, each for itself: equal ones share their code.

    The forward functions are compiled, not the modules, so that the hooks by which ZeRO 3 fetches a block's parameters
    stay outside.
    """
    # A block's code is compiled for each width, precision and use: student, decoder, teachers, evaluation.
    torch._dynamo.config.recompile_limit = max(COMPILED_VARIANTS, torch._dynamo.config.recompile_limit)
    block: Any
    for module in (method.student, *(teacher.module for teacher in method.teachers.values())):
        for block in (found for found in module.modules() if isinstance(found, Block)):
            block.forward = torch.compile(block.forward)


def check_slices(batch: BatchConfig, world_size: int) -> None:
    """Raises ValueError where ranks would get different, odd or no numbers of images per micro-batch."""
    try:
        slice_of(0, world_size, batch.micro_size)
    except ValueError as error:
        named = f"batch.global_size {batch.global_size} with batch.accumulation {batch.accumulation}"
        raise ValueError(f"{named}: {error}") from None
