"""The switches of MAE-CT."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class MaectConfig:
    """MAE-CT (arXiv 2304.10520); the defaults are the authors' for ViT-B/16.  docs/methods.md says what is ours."""

    stage: Literal["head", "tune"] = "head"
    """``head`` trains a contrastive head on an encoder that stays as it is; ``tune``, after it, both head and the upper
    blocks."""
    pooling: Literal["mean", "cls"] = "mean"
    """What the head gets: the mean patch token (ViT-B), or the class token (ViT-L and ViT-H)."""
    projector_hidden: int = 2048
    """Width of the projector's two hidden layers."""
    projection: int = 256
    """Width of projections, predictions and queue entries."""
    predictor_hidden: int = 4096
    """Width of the predictor's hidden layer."""
    temperature: float = 0.15
    """Of the softmax over all predictions."""
    top_k: int = 1
    """A neighbour is one of as many nearest entries, drawn at random; 1 under ``head``, 20 under ``tune`` (authors)."""
    queue_size: int = 65536
    """Entries among which neighbours are looked up; a multiple of the images per micro-batch."""
    frozen_blocks: int | None = None
    """Under ``tune``: lowest blocks that stay as they are, and the stem with them; half of them when not set."""
    projector_momentum: float = 0.99
    """Under ``tune``: of the average of the projector whose projections are looked up and queued."""
    encoder_momentum: float = 0.9999
    """Under ``tune``: of the average of the encoder that is judged beside the student."""

    def __post_init__(self) -> None:
        for name in ("projector_hidden", "projection", "predictor_hidden", "top_k", "queue_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"maect.{name} is {getattr(self, name)}; it must be at least 1")
        if self.temperature <= 0:
            raise ValueError(f"maect.temperature is {self.temperature}; it must be above 0")
        if self.top_k > self.queue_size:
            raise ValueError(f"maect.top_k is {self.top_k}; the queue holds only {self.queue_size} entries")
        for name in ("projector_momentum", "encoder_momentum"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"maect.{name} is {getattr(self, name)}; it must lie in [0, 1]")
        if self.frozen_blocks is not None and self.stage == "head":
            raise ValueError("maect.frozen_blocks is set, but stage: head freezes the whole encoder; leave it out")
        if self.frozen_blocks is not None and self.frozen_blocks < 0:
            raise ValueError(f"maect.frozen_blocks is {self.frozen_blocks}; it must be at least 0")
