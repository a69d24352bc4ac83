"""From a method to a DeepSpeed engine with its teachers."""

from typing import Any

import torch

from maestri.engine.config import BatchConfig, EngineConfig, OptimizerConfig
from maestri.engine.deepspeed_config import deepspeed_config
from maestri.engine.distributed import Ranks
from maestri.engine.masters import MasterGroup, masters_of
from maestri.engine.parameter_groups import parameter_groups
from maestri.engine.teachers import Teachers, prepare_teachers
from maestri.model.method import Method
from maestri.pipelines.order import slice_of

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def start_engine(
    method: Method, ranks: Ranks, *, batch: BatchConfig, optimizer: OptimizerConfig, engine: EngineConfig
) -> tuple[Any, Teachers, list[MasterGroup]]:
    """Returns DeepSpeed's engine around the student, the teachers, and the student's float32 masters.

    Raises:
        ValueError: ranks would get different numbers of images.
    """
    import deepspeed  # type: ignore[import-untyped]

    check_slices(batch, ranks.world_size)
    prepare_teachers(method, device=ranks.device, dtype=COMPUTE_DTYPES[engine.precision])
    method.state.to(ranks.device)
    wrapped, *_ = deepspeed.initialize(
        model=method.student,
        model_parameters=parameter_groups(method, weight_decay=optimizer.weight_decay),
        config=deepspeed_config(
            batch=batch,
            optimizer=optimizer,
            engine=engine,
            world_size=ranks.world_size,
            on_gpu=ranks.device.type == "cuda",
        ),
        dist_init_required=False,
    )
    _rewind_optimizer(wrapped)
    groups = masters_of(wrapped)
    return wrapped, Teachers(method, wrapped.module, groups), groups


def _rewind_optimizer(engine: Any) -> None:
    """Sets AdamW's step counters back to 0.

    At ZeRO 0 in bf16, DeepSpeed 0.19.8 allocates the state by a step on zero gradients and leaves the counters at 1:
    the bias correction is then that of the second step, and the first update 27 % short at betas (0.9, 0.95).
    """
    for state in engine.basic_optimizer.state.values():
        if "step" in state:
            state["step"].zero_()


def check_slices(batch: BatchConfig, world_size: int) -> None:
    """Raises ValueError where ranks would get different, odd or no numbers of images per micro-batch."""
    try:
        slice_of(0, world_size, batch.micro_size)
    except ValueError as error:
        named = f"batch.global_size {batch.global_size} with batch.accumulation {batch.accumulation}"
        raise ValueError(f"{named}: {error}") from None
