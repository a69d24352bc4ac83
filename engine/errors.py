"""What ends a run with one line instead of a traceback."""

from pathlib import Path


class RunError(Exception):
    """A run cannot go on, for a reason outside of the program; the message is one line for the user."""


class LostRank(Exception):
    """A collective failed on this rank, because another one has ended or hangs; the message is one line."""

    def __init__(self, places: str) -> None:
        """``places`` says where ranks were last heard; it may be empty."""
        super().__init__(
            f"another rank has ended or hangs{f' ({places})' if places else ''}; see what it says, and run again to "
            "continue from the last checkpoint"
        )


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
    """Loss or gradient was infinite or not a number more often than the run allows.

    Attributes:
        step: optimizer steps done, skipped ones among them.
        skipped: how many were skipped.
        folder: where their samples are written down.
    """

    def __init__(self, step: int, *, skipped: int, folder: Path) -> None:
        super().__init__(
            f"{skipped} steps were skipped for a loss or gradient that is not finite, more than engine.max_skipped "
            f"allows, the last one step {step}; their samples are listed in {folder}: lower optimizer.base_lr, set "
            "optimizer.clip or use engine.precision fp32, and run again to continue from the last checkpoint"
        )
        self.step = step
        self.skipped = skipped
        self.folder = folder


class NonFiniteWeights(RunError):
    """Weights are not finite, so they are not saved.

    Attributes:
        step: optimizer steps done.
        group: the first optimizer group that holds such a weight.
    """

    def __init__(self, step: int, group: str) -> None:
        super().__init__(
            f"weights of {group} are not finite after step {step}, so they are not saved: the loss was finite and a "
            "gradient was not; set engine.check_gradients true and run again to continue from the last checkpoint"
        )
        self.step = step
        self.group = group
