"""Learning rate, momentum and warm-up as pure functions of the optimizer step."""

import math
from dataclasses import dataclass

from maestri.engine.config import OptimizerConfig


def span_of(value: float, num_steps: int) -> int:
    """Returns optimizer steps for ``value``: a fraction of the run below 1, a count of steps from 1 on."""
    return round(value * num_steps) if value < 1.0 else round(value)


def scaled_lr(base_lr: float, global_size: int) -> float:
    """Returns the peak learning rate by the linear rule, ``base_lr · images per optimizer step / 256``."""
    return base_lr * global_size / 256


def cosine(step: int, num_steps: int, start: float, end: float) -> float:
    """Returns the half-cosine from ``start`` at step 0 to ``end`` at step ``num_steps`` and after."""
    progress = min(1.0, step / num_steps) if num_steps > 0 else 1.0
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * progress))


def warmup_cosine(step: int, *, num_steps: int, warmup: int, peak: float, end: float) -> float:
    """Returns the learning rate at a 0-based optimizer step: linear to ``peak`` over ``warmup`` steps, then a cosine.

    The first step already has ``peak / warmup``; the last of the run comes within one step of ``end``.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, num_steps - warmup, peak, end)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheduled:
    """What the optimizer is set to for one step."""

    learning_rate: float
    """Of groups whose ``lr_scale`` is 1."""
    weight_decay: float
    """Of groups whose decay follows the run's schedule."""
    prototypes_frozen: bool
    """Whether prototypes stay as they are."""


def scheduled(config: OptimizerConfig, step: int, *, num_steps: int, global_size: int) -> Scheduled:
    """Returns the settings of a 0-based optimizer step of ``global_size`` images."""
    end = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
    return Scheduled(
        learning_rate=warmup_cosine(
            step,
            num_steps=num_steps,
            warmup=span_of(config.warmup, num_steps),
            peak=scaled_lr(config.base_lr, global_size),
            end=config.min_lr,
        ),
        weight_decay=cosine(step, num_steps, config.weight_decay, end),
        prototypes_frozen=step < span_of(config.freeze_prototypes, num_steps),
    )
