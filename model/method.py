"""What a pretraining method is to the engine: targets, one student call, a loss, and its teachers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from maestri.pipelines.batch import Batch


@dataclass(kw_only=True, slots=True)
class Teacher:
    """A module that follows parameters of the student by an exponential moving average."""

    module: nn.Module
    """Compute copy, outside DeepSpeed; its parameter and buffer names are the followed student names."""
    follows: tuple[str, ...]
    """Prefixes of student parameter names, e.g. ``("encoder.", "class_head.")``; all must exist in ``module``."""
    momentum: Callable[[int], float]
    """Optimizer step (0-based) → m in ``ema ← m · ema + (1 − m) · student``."""
    every: int = 1
    """Optimizer steps between updates."""
    buffers: Literal["copy", "own"] = "copy"
    """Whether buffers are copied from the student at each update, or the teacher keeps its own."""
    train_mode: bool = False
    """Whether the module runs in train mode (batch statistics, drop-path); methods here use eval mode."""


class Method(Protocol):
    """A pretraining method: knows nothing of DeepSpeed, of files or of the whole configuration.

    The engine wraps ``student`` once and calls, per micro-step::

        with torch.no_grad():
            targets = method.targets(batch, step)
        outputs = engine(batch)                       # = method.student(batch)
        loss, metrics = method.loss(outputs, targets, step)
        engine.backward(loss); engine.step()
        method.commit()                               # or rollback(), where the optimizer step was skipped
    """

    @property
    def student(self) -> nn.Module:
        """``student(batch)`` returns a flat ``dict[str, Tensor]``; ``student.encoder`` is the encoder."""
        ...

    @property
    def teachers(self) -> Mapping[str, Teacher]:
        """By role, e.g. ``labelling_teacher`` and ``reconstruction_teacher``; each module has an ``encoder``."""
        ...

    @property
    def state(self) -> nn.Module:
        """Queues, centres, codebooks: float32 buffers outside the student, identical on all ranks, saved with it."""
        ...

    def targets(self, batch: Batch, step: int) -> Mapping[str, Tensor]:
        """Returns what the student is asked for; runs under ``no_grad`` and may stage updates of ``state``."""
        ...

    def loss(
        self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Returns the scalar to minimise on this rank, and detached scalar metrics (mean over this rank)."""
        ...

    def monitors(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns scalars that tell of collapse, too dear for every step: called once per logging period."""
        ...

    def commit(self) -> None:
        """Makes the updates of ``state`` that this micro-step staged."""
        ...

    def rollback(self) -> None:
        """Forgets them: the optimizer step was skipped."""
        ...
