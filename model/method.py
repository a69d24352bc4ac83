"""What a pretraining method is to the engine: targets, one student call, a loss, and its teachers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from maestri.pipelines.batch import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewFacts:
    """What a run's views carry, for a method to check before anything is built."""

    num_views: int
    """Global views of a sample."""
    num_local: int = 0
    """Local views of a sample."""
    num_masked: int | None = 0
    """Tokens that each global view hides; None where views hide different numbers."""
    corrupted: bool = False
    """Whether global views have corrupted twins."""
    aligned: bool = True
    """Whether what is corrupted is made of whole tokens."""
    micro_size: int = 0
    """Images per micro-batch, over all ranks; 0 where that is not known."""

    def refuse_local(self, method: str) -> None:
        """Raises ValueError where there are local views."""
        if self.num_local:
            raise ValueError(f"views.local.count is {self.num_local}; method {method} has no use for local views")

    def refuse_corruption(self, method: str) -> None:
        """Raises ValueError where views have corrupted twins."""
        if self.corrupted:
            raise ValueError(
                f"views.corruption.coverage is above 0; method {method} does not look at corrupted views; set it to 0"
            )

    def need_pairs(self, what: str, *, instead: str = "") -> None:
        """Raises ValueError unless a sample has several views for ``what`` to compare; ``instead`` ends the message."""
        if self.num_views + self.num_local < 2:
            raise ValueError(
                f"views.count is {self.num_views} and views.local.count is {self.num_local}; {what} compares views: "
                f"raise one of them{instead}"
            )

    def need_hidden(self, method: str, *, at_least: int) -> None:
        """Raises ValueError unless all views hide the same number of tokens, and that number is large enough."""
        if self.num_masked is None:
            raise ValueError(
                f"views.mask.spread and views.mask.unmasked must be 0: method {method} encodes visible tokens alone, "
                "equally many in each view"
            )
        if self.num_masked < at_least:
            raise ValueError("views.mask.ratio hides no token, but the method predicts hidden tokens; raise it")


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
    """Whether the module runs in train mode (batch statistics, drop-path)."""


class Method(Protocol):
    """A pretraining method: knows nothing of DeepSpeed, of files or of the whole configuration.

    The engine wraps ``student`` once and calls, per micro-step::

        with torch.no_grad():
            targets = method.targets(batch, step)
        outputs = engine(batch)                       # = method.student(batch)
        loss, metrics = method.loss(outputs, targets, step)
        engine.backward(loss); engine.step()
        commit(method.state)                          # or rollback, where the optimizer step was skipped
    """

    @property
    def student(self) -> nn.Module:
        """``student(batch)`` returns a flat ``dict[str, Tensor]``; ``student.encoder`` is the encoder."""
        ...

    @property
    def teachers(self) -> Mapping[str, Teacher]:
        """By role, e.g. ``labelling_teacher``; those whose module has an ``encoder`` are judged beside the student."""
        ...

    @property
    def state(self) -> nn.Module:
        """Queues, centres, codebooks: float32 buffers outside the student, identical on all ranks, saved with it.

        Parts that micro-steps change are ``staged.Staged``.
        """
        ...

    @property
    def inherits(self) -> tuple[str, ...]:
        """Prefixes of student parameters that must come from another run; empty: it can start from drawn weights.

        Those of ``state`` are taken from it where they have the same shape.
        """
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
