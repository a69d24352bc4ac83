"""One optimizer step, as the algorithm reads."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maestri.engine.finite import FiniteGuard
from maestri.engine.schedules import Scheduled
from maestri.engine.spans import span
from maestri.engine.teachers import Teachers
from maestri.model.method import Method
from maestri.model.staged import commit, rollback
from maestri.pipelines.batch import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step leaves for the log; tensors stay on the device."""

    metrics: Mapping[str, Tensor]
    """Detached scalars, means over this rank's micro-batches, ``loss`` among them; none of a skipped step."""
    applied: bool
    """Whether the optimizer changed the weights."""


def set_schedules(engine: Any, settings: Scheduled) -> None:
    """Sets learning rate and weight decay of every optimizer group of DeepSpeed's engine for the next step."""
    for group in engine.optimizer.param_groups:
        frozen = settings.prototypes_frozen and group["is_prototypes"]
        group["lr"] = 0.0 if frozen else settings.learning_rate * group["lr_scale"]
        if group["is_scheduled"]:
            group["weight_decay"] = settings.weight_decay


def train_step(
    engine: Any,
    method: Method,
    teachers: Teachers,
    batches: Iterator[Batch],
    step: int,
    *,
    guard: FiniteGuard,
    monitor: bool = False,
) -> StepResult:
    """Runs one optimizer step (0-based ``step``) of as many micro-batches as DeepSpeed accumulates.

    It is skipped where the loss of any micro-batch is not finite on any rank.

    Args:
        engine: DeepSpeed's engine around ``method.student``.
        guard: looks at every loss.
        monitor: Whether to add the method's dearer figures, of the last micro-batch.

    Raises:
        NonFiniteLoss: more steps were skipped than the run allows.
    """
    accumulation = engine.gradient_accumulation_steps()
    totals: dict[str, Tensor] = {}
    applied = refused = False
    for micro_step in range(accumulation):
        with span("data"):
            batch = next(batches)
        with span("teachers"), torch.no_grad():
            targets = method.targets(batch, step)
        with span("student"):
            outputs = engine(batch)
        with span("loss"):
            loss, metrics = method.loss(outputs, targets, step)
            watched = guard.watch(loss)
        with span("backward"):
            engine.backward(watched)  # divides by the number of micro-batches; ranks are averaged
        with span("optimizer"):
            finite = guard.was_finite()
            refused |= not finite
            is_last = micro_step + 1 == accumulation
            if is_last:
                applied = guard.step(engine, drop=refused)
            else:
                engine.step()  # counts the micro-batch
        if finite and (applied or not is_last):
            commit(method.state)
        else:
            rollback(method.state)
            if not (finite and refused):  # its loss is not finite on some rank, or the step's gradient is not
                guard.note(batch, loss, step=step)
        for name, value in {"loss": loss.detach(), **metrics}.items():
            totals[name] = totals[name] + value if name in totals else value
    if not applied:
        guard.count(step)
        return StepResult(metrics={}, applied=False)
    means = {name: total.float() / accumulation for name, total in totals.items()}
    if monitor:
        with span("monitor"), torch.no_grad():
            means |= method.monitors(outputs, targets)
    with span("averages"):
        teachers.update(step)
    return StepResult(metrics=means, applied=True)
