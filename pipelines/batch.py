"""What the data path hands to the model."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One micro-batch on the device; every mapping is keyed by the name of a view group (``"global"``)."""

    views: Mapping[str, Tensor]
    """Pixels: uint8, 0–255, ``view batch 3 height width``; memory may be channels-last."""
    token_mask: Mapping[str, Tensor]
    """bool ``view batch token``, row-major over the patch grid; True = hidden from the student."""
    visible: Mapping[str, Tensor]
    """int64 ``view batch visible``, ascending; present where every sample hides the same number of tokens."""
    masked: Mapping[str, Tensor]
    """int64 ``view batch masked``, ascending; the complement of ``visible``, present with it."""
    labels: Tensor
    """int64 ``batch``; −1 where the data set has none.  For evaluation and logging, never for a pretext loss."""
    rows: Tensor
    """int64 ``batch``; rows of the ShardSet."""
    position: int
    """Global position of this rank's first sample."""
