"""The one place where a run's configuration becomes DeepSpeed's."""

from typing import Any

from maestri.engine.config import BatchConfig, EngineConfig, OptimizerConfig

LARGEST_BUCKET = 500_000_000
"""Elements of gradients that are reduced at once, at most: DeepSpeed's own default."""


def deepspeed_config(
    *,
    batch: BatchConfig,
    optimizer: OptimizerConfig,
    engine: EngineConfig,
    num_trained: int,
    world_size: int,
    on_gpu: bool,
) -> dict[str, Any]:
    """Returns the dict for ``deepspeed.initialize``.

    AdamW is torch's own, fused on a GPU, so that nothing is compiled at start-up.  The learning rate is set before
    each step by the training loop, hence no scheduler here.

    Args:
        num_trained: elements of all trained parameters.
    """
    return {
        "train_batch_size": batch.global_size,
        "train_micro_batch_size_per_gpu": batch.micro_size // world_size,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": optimizer.clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 0.0,
                "betas": list(optimizer.betas),
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                "torch_adam": True,
            }
            | ({"fused": True} if on_gpu else {}),
        },
        "bf16": {"enabled": engine.precision == "bf16", "check_grad_overflow": engine.check_gradients},
        "zero_optimization": {
            "stage": engine.zero_stage,
            # Permutes parameters inside a flat partition behind DeepSpeed's own getters, which then answer wrongly.
            "round_robin_gradients": False,
            # A buffer of so many elements is allocated however small the model is: 1 GiB of bf16 by default.
            "reduce_bucket_size": min(LARGEST_BUCKET, num_trained),
        }
        | ({"offload_optimizer": {"device": "cpu", "pin_memory": on_gpu}} if engine.offload == "optimizer" else {}),
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }
