"""Discrete targets for token reconstruction: a codebook over a teacher's patch tokens, learnt by online k-means."""

import torch
import torch.nn.functional as F
from torch import Tensor

from maestri.model.assignment import sinkhorn
from maestri.model.collectives import sum_over_ranks, world_size
from maestri.model.staged import Staged


class Codebook(Staged):
    """``size`` unit vectors in the space of layer-normalised tokens; float32, without gradient, equal on all ranks.

    Tokens are assigned by balanced (Sinkhorn) similarity and codes follow the mean of their tokens, as an
    exponential moving average of sums and counts.  Every ``reseed_every`` steps, a code whose count fell below
    ``dead`` of its fair share is re-seeded with a token.  ``frozen`` keeps the first codes: random tokens of the
    first micro-step.
    """

    codes: Tensor
    sums: Tensor
    counts: Tensor
    started: Tensor

    def __init__(
        self, *, size: int, dim: int, momentum: float = 0.99, temperature: float = 0.05, dead: float = 0.01,
        reseed_every: int = 16, frozen: bool = False, seed: int = 0,
        num_positions: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.momentum, self.temperature, self.dead = momentum, temperature, dead
        self.reseed_every, self.frozen, self.seed = reseed_every, frozen, seed
        self.num_positions = num_positions
        self.register_buffer("codes", torch.zeros(size, dim))
        self.register_buffer("sums", torch.zeros(size, dim))
        self.register_buffer("counts", torch.zeros(size))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self._staged: dict[str, Tensor] | None = None
        self._ready = False

    @torch.no_grad()
    def assign(self, tokens: Tensor, positions: Tensor, *, step: int) -> Tensor:
        """Returns int64 ``view batch token``: the code of each of ``view batch token dim``, and stages the update.

        The first call seeds the codes.  Which tokens seed is drawn over all ranks' samples in rank order, so it does
        not depend on the number of ranks.
        """
        normal = F.layer_norm(tokens.float(), tokens.shape[-1:])
        if self.num_positions:
            normal = normal - self._position_means(normal, positions)
        unit = F.normalize(normal, dim=-1)
        if not self._ready:
            if not self.started:  # a device sync, once a process
                self._seed(unit, step)
            self._ready = True
        flat = unit.flatten(0, 2)
        scores = flat @ self.codes.T
        index = (scores if self.frozen else sinkhorn(scores, temperature=self.temperature)).argmax(dim=-1)
        if not self.frozen:
            self._stage(unit, index, step)
        return index.view(tokens.shape[:3])

    def commit(self) -> None:
        """Makes the staged update."""
        if self._staged is not None:
            for name, value in self._staged.items():
                getattr(self, name).copy_(value)
            self._staged = None

    def rollback(self) -> None:
        """Forgets the staged update."""
        self._staged = None

    def _position_means(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Returns, for each token, the mean over all ranks' tokens at its position."""
        flat, index = tokens.flatten(0, 2), positions.flatten()
        packed = torch.zeros(self.num_positions, flat.shape[1] + 1, device=flat.device)
        packed[:, :-1].index_add_(0, index, flat)
        packed[:, -1].index_add_(0, index, flat.new_ones(len(flat)))  # bincount would wait for a GPU
        packed = sum_over_ranks(packed)
        means = packed[:, :-1] / packed[:, -1:].clamp_min(1.0)
        return means[index].view(tokens.shape)

    def _seed(self, unit: Tensor, step: int) -> None:
        self.codes.copy_(self._draw(unit, step))
        self.sums.copy_(self.codes)
        self.counts.fill_(1.0)
        self.started.fill_(True)

    def _stage(self, unit: Tensor, index: Tensor, step: int) -> None:
        size, dim = self.codes.shape
        flat = unit.flatten(0, 2)
        # One buffer, one collective: sums in the first columns, counts in the last.
        packed = torch.zeros(size, dim + 1, device=flat.device)
        packed[:, :dim].index_add_(0, index, flat)
        packed[:, dim].index_add_(0, index, flat.new_ones(len(flat)))
        # In units of a fair share, so that momentum and threshold don't depend on the batch.
        packed = sum_over_ranks(packed) * (size / (len(flat) * world_size()))
        sums = torch.lerp(packed[:, :dim], self.sums, self.momentum)
        counts = torch.lerp(packed[:, dim], self.counts, self.momentum)
        if step % self.reseed_every == 0:
            dead = counts < self.dead
            sums = torch.where(dead[:, None], self._draw(unit, step), sums)
            counts = torch.where(dead, torch.ones_like(counts), counts)
        self._staged = {"sums": sums, "counts": counts, "codes": F.normalize(sums, dim=-1)}

    def _draw(self, unit: Tensor, step: int) -> Tensor:
        """Returns ``size dim`` tokens drawn over all ranks, the same on every rank and for every world size."""
        views, batch, num_tokens, dim = unit.shape
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        shape = (len(self.codes),)
        sample = torch.randint(batch * world_size(), shape, generator=generator).to(unit.device)
        view = torch.randint(views, shape, generator=generator).to(unit.device)
        token = torch.randint(num_tokens, shape, generator=generator).to(unit.device)
        local = sample - batch * (torch.distributed.get_rank() if world_size() > 1 else 0)
        mine = (local >= 0) & (local < batch)
        chosen = unit[view, local.clamp(0, batch - 1), token]
        return sum_over_ranks(torch.where(mine[:, None], chosen, torch.zeros_like(chosen)))
