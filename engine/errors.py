"""What ends a run with one line instead of a traceback."""

from pathlib import Path


class RunError(Exception):
    """A run cannot go on, for a reason outside of the program; the message is one line for the user."""


class CheckpointError(RunError):
    """A checkpoint could not be written or does not fit this run."""


class CheckpointDamaged(CheckpointError):
    """A checkpoint's files are not what was written.

    Attributes:
        checkpoint: its folder.
        reason: which file, and what is wrong with it.
    """

    def __init__(self, checkpoint: Path, reason: str) -> None:
        super().__init__(f"checkpoint {checkpoint} is damaged: {reason}")
        self.checkpoint = checkpoint
        self.reason = reason


class NonFiniteLoss(RunError):
    """The loss became infinite or not a number.

    Attributes:
        step: optimizer steps done when it was seen.
        value: the loss.
    """

    def __init__(self, step: int, value: float) -> None:
        super().__init__(
            f"the loss is {value} at step {step}; nothing was saved since: lower optimizer.base_lr, set optimizer.clip "
            "or use engine.precision fp32, and run again to continue from the last checkpoint"
        )
        self.step = step
        self.value = value
