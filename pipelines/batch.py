"""What the data path hands to the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One micro-batch on the device; every mapping is keyed by the name of a view group (``"global"``, ``"local"``)."""

    views: Mapping[str, Tensor]
    """Pixels: uint8, 0–255, ``view batch 3 height width``; memory may be channels-last.  Where views are corrupted, the
    corrupted twin of each stands under ``"global_corrupted"``."""
    token_mask: Mapping[str, Tensor]
    """bool ``view batch token``, row-major over the patch grid; True = hidden from the student, or corrupted."""
    visible: Mapping[str, Tensor]
    """int64 ``view batch visible``, ascending; present where every sample hides the same number of tokens."""
    masked: Mapping[str, Tensor]
    """int64 ``view batch masked``, ascending; the complement of ``visible``, present with it."""
    pixel_mask: Mapping[str, Tensor] = field(default_factory=dict)
    """bool ``view batch height width``; True = corrupted; present where corruption isn't made of whole tokens."""
    labels: Tensor
    """int64 ``batch``; −1 where the data set has none.  For evaluation and logging, never for a pretext loss."""
    rows: Tensor
    """int64 ``batch``; rows of the ShardSet."""
    position: int
    """Global position of this rank's first sample."""
