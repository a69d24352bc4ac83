"""A queue of earlier projections, among which nearest neighbours are looked up, as in NNCLR (arXiv 2104.14548)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from maestri.model.collectives import gather_over_ranks
from maestri.model.staged import Staged

NOBODY = -1
"""Row of an entry that is no sample, and label of one that has none."""


class NeighbourQueue(Staged):
    """``size`` unit vectors, float32, first in, first out; equal on all ranks, and saved whole.

    It starts with random directions that belong to no sample.  ``enqueue`` stages, ``commit`` writes.
    """

    entries: Tensor
    rows: Tensor
    labels: Tensor
    pointer: Tensor

    def __init__(self, *, size: int, dim: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("entries", F.normalize(torch.randn(size, dim, generator=generator), dim=-1))
        self.register_buffer("rows", torch.full((size,), NOBODY))
        self.register_buffer("labels", torch.full((size,), NOBODY))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self._staged: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def nearest(self, queries: Tensor, rows: Tensor, draws: Tensor, *, top_k: int) -> Tensor:
        """Returns the index of one of the ``top_k`` entries nearest to each query, int64 ``view batch``.

        Entries of the query's own sample are passed over.

        Args:
            queries: unit vectors, float32 ``view batch dim``.
            rows: of the samples, int64 ``batch``.
            draws: which of the nearest is taken, 0 the nearest, int64 ``view batch``.
            top_k: of how many.
        """
        similarity = queries @ self.entries.T
        similarity.masked_fill_(self.rows == rows[:, None], -torch.inf)
        return similarity.topk(top_k, dim=-1).indices.gather(-1, draws[..., None])[..., 0]

    @torch.no_grad()
    def enqueue(self, projections: Tensor, rows: Tensor, labels: Tensor) -> None:
        """Stages this rank's unit vectors ``batch dim``, rows and labels, behind those of the ranks before it."""
        self._staged = gather_over_ranks(projections), gather_over_ranks(rows), gather_over_ranks(labels)

    @torch.no_grad()
    def commit(self) -> None:
        """Writes what is staged over the oldest entries."""
        if self._staged is None:
            return
        count = len(self._staged[0])
        places = (self.pointer + torch.arange(count, device=self.pointer.device)) % len(self.entries)
        for buffer, values in zip((self.entries, self.rows, self.labels), self._staged, strict=True):
            buffer[places] = values
        self.pointer.add_(count).remainder_(len(self.entries))
        self._staged = None

    def rollback(self) -> None:
        """Forgets it."""
        self._staged = None
