"""Teachers' scores → pseudo labels that do not collapse: Sinkhorn, centring, ME-MAX; and what watches for collapse."""

import math
from typing import Literal

import torch
from torch import Tensor

from maestri.model.collectives import max_over_ranks, mean_over_ranks_with_gradient, sum_over_ranks, world_size
from maestri.model.staged import Staged

Balance = Literal["sinkhorn", "centring", "none"]
SinkhornStart = Literal["scores", "probabilities"]


def sinkhorn(scores: Tensor, *, temperature: float, iterations: int = 3, start: SinkhornStart = "scores") -> Tensor:
    """Returns soft labels ``sample proto``, float32, rows sum to 1, prototypes used alike over all ranks' samples.

    SwAV (arXiv 2006.09882), algorithm 1, in the scaled form: only the two scaling vectors are iterated, and the
    maximum over all ranks is taken off first, so that no score can overflow.

    Args:
        scores: ``sample proto`` of this rank, e.g. cosine similarities; every rank has as many samples.
        temperature: divides the scores.
        iterations: pairs of (prototype, sample) normalisations.
        start: what is normalised first: ``scores``, exp(scores / temperature), in which a sample whose scores are all
            high weighs more; or ``probabilities``, softmax(scores / temperature), in which samples weigh alike, as in
            MSN (arXiv 2204.07141): its predictions softmax(scores / τ), sharpened by T, are those at temperature τ · T.
    """
    scores = scores.float() / temperature
    if start == "probabilities":
        kernel = torch.softmax(scores, dim=-1)
    else:
        kernel = (scores - max_over_ranks(scores.max().clone())).exp()
    num_samples, num_prototypes = kernel.shape[0] * world_size(), kernel.shape[1]
    sample_scale = torch.full((kernel.shape[0],), 1.0 / num_samples, device=kernel.device)
    prototype_scale = torch.ones(num_prototypes, device=kernel.device)
    for _ in range(iterations):
        totals = sum_over_ranks(sample_scale @ kernel)
        prototype_scale = 1.0 / (num_prototypes * totals.clamp_min(torch.finfo(torch.float32).tiny))
        sample_scale = 1.0 / (num_samples * (kernel @ prototype_scale).clamp_min(torch.finfo(torch.float32).tiny))
    return kernel * prototype_scale * (num_samples * sample_scale)[:, None]


class Assigner(Staged):
    """One level of pseudo labels (class or data tokens): a balance device and its state.

    ``labels`` stages an update of the centre, ``commit`` makes it: a skipped step must leave no trace.
    """

    center: Tensor

    def __init__(
        self,
        balance: Balance,
        *,
        num_prototypes: int,
        center_momentum: float = 0.9,
        iterations: int = 3,
        start: SinkhornStart = "scores",
    ) -> None:
        """Makes the state: a centre of zeros.

        Args:
            balance: the device.
            num_prototypes: scores of a sample.
            center_momentum: of the centre, for centring.
            iterations: of Sinkhorn.
            start: of Sinkhorn.
        """
        super().__init__()
        self.balance = balance
        self.iterations = iterations
        self.start = start
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(num_prototypes))
        self._staged: Tensor | None = None

    def labels(self, scores: Tensor, *, temperature: float) -> Tensor:
        """Returns float32 soft labels ``sample proto`` for teacher scores of the same shape."""
        scores = scores.float()
        if self.balance == "sinkhorn":
            return sinkhorn(scores, temperature=temperature, iterations=self.iterations, start=self.start)
        if self.balance == "centring":
            mean = sum_over_ranks(scores.mean(dim=0)) / world_size()
            self._staged = self.center_momentum * self.center + (1 - self.center_momentum) * mean
            return torch.softmax((scores - self.center) / temperature, dim=-1)
        return torch.softmax(scores / temperature, dim=-1)

    def commit(self) -> None:
        """Makes the staged update of the centre."""
        if self._staged is not None:
            self.center.copy_(self._staged)
            self._staged = None

    def rollback(self) -> None:
        """Forgets the staged update."""
        self._staged = None


def cross_entropy(labels: Tensor, scores: Tensor, *, temperature: float) -> Tensor:
    """Returns H(labels, softmax(scores / temperature)) per sample, float32 ``sample``; labels sum to 1 per sample."""
    logits = scores.float() / temperature
    expected: Tensor = (labels * logits).sum(dim=-1)
    return torch.logsumexp(logits, dim=-1) - expected


def me_max(scores: Tensor, *, temperature: float) -> Tensor:
    """Returns log K − H(mean prediction over all ranks' samples), ≥ 0; MSN (arXiv 2204.07141), equation 2."""
    mean = torch.softmax(scores.float() / temperature, dim=-1).mean(dim=0)
    mean = mean_over_ranks_with_gradient(mean)
    negative_entropy: Tensor = torch.special.xlogy(mean, mean).sum()
    return math.log(scores.shape[-1]) + negative_entropy


@torch.no_grad()
def mutual_information(scores: Tensor, *, temperature: float, limit: int = 4096) -> tuple[Tensor, Tensor]:
    """Returns ``(H(mean p) − mean H(p), mean H(p))`` of softmax(scores / temperature), as shares of log K.

    0 is collapse, whether all samples agree or no sample says anything; taken before Sinkhorn, which would hide
    it.  Over the first ``limit`` samples of this rank: it is a monitor.
    """
    p = torch.softmax(scores[:limit].float() / temperature, dim=-1)
    mean = p.mean(dim=0)
    scale = math.log(scores.shape[-1])
    mean_entropy = torch.special.entr(p).sum(dim=-1).mean()
    return (torch.special.entr(mean).sum() - mean_entropy) / scale, mean_entropy / scale


@torch.no_grad()
def prototypes_used(scores: Tensor, *, limit: int = 4096) -> Tensor:
    """Returns how many prototypes are some sample's best, as a share of as many as could be.

    That is the prototypes or the samples, whichever are fewer.  Over the first ``limit`` samples of this rank.
    """
    best = scores[:limit].argmax(dim=-1)
    is_used = torch.zeros(scores.shape[-1], device=scores.device).index_fill_(0, best, 1.0)
    return is_used.sum() / min(len(best), scores.shape[-1])


@torch.no_grad()
def rank_me(features: Tensor) -> Tensor:
    """Returns the effective rank of ``sample dim``: RankMe (arXiv 2210.02885), exp of the singular values' entropy."""
    # A decomposition fails on what is not finite; the loss tells of that in one line.
    finite = torch.nan_to_num(features.float(), nan=0.0, posinf=0.0, neginf=0.0)
    values = torch.linalg.svdvals(finite)
    share = values / values.sum().clamp_min(1e-12)
    entropy: Tensor = torch.special.entr(share).sum()
    return entropy.exp()
