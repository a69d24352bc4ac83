"""Random numbers of a micro-batch over all ranks, which depend neither on the number of ranks nor on earlier draws."""

import torch
from torch import Tensor

from maestri.model.collectives import rank, world_size
from maestri.pipelines.batch import Batch


def batch_generator(batch: Batch, seed: int) -> torch.Generator:
    """Returns a micro-batch's generator, the same on all ranks: of the seed and of its first global position."""
    first = batch.position - rank() * len(batch.rows)
    return torch.Generator().manual_seed((seed * 1_000_003 + first) % (1 << 63))


def samples_over_ranks(batch: Batch) -> int:
    """Returns how many samples the micro-batch has on all ranks together."""
    return len(batch.rows) * world_size()


def own_samples(drawn: Tensor, batch: Batch) -> Tensor:
    """Returns this rank's share of what was drawn for all samples, ``view sample …``."""
    size = len(batch.rows)
    return drawn[:, rank() * size :][:, :size]
