"""Weighted k-nearest-neighbour classification of frozen features, as in DINO (arXiv 2104.14294)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from maestri.evals.protocol import Accuracies, FeatureSets, KnnReport, LabelledFeatures, Setting
from maestri.evals.sharing import place


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnSettings:
    """What the neighbours' vote is."""

    k: tuple[int, ...]
    """Numbers of neighbours."""
    temperature: float = 0.07
    """Temperature of the votes' weights."""

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ValueError(f"k is {list(self.k)}; give at least one number of neighbours, each at least 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")


@torch.no_grad()
def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    *,
    k: tuple[int, ...],
    temperature: float,
    chunk: int = 1024,
) -> dict[int, float]:
    """Returns top-1 accuracy in percent for each k; every rank must call it, and classifies a share of the queries.

    Cosine similarity; each of the k nearest bank samples votes for its class with weight exp(similarity /
    temperature).  Exact search, ``chunk`` queries at a time.

    Args:
        bank: float ``sample dim``.
        bank_labels: int64 ``sample``.
        queries: float ``query dim``.
        labels: int64 ``query``.
        k: numbers of neighbours.
        temperature: of the votes.
        chunk: queries per similarity matrix.

    Raises:
        ValueError: labels are missing (negative), or there are fewer bank samples than neighbours.
    """
    if bool((bank_labels < 0).any()) or bool((labels < 0).any()):
        raise ValueError("k-NN needs labels, and this data set has none; convert it from class folders")
    if len(bank) < max(k):
        raise ValueError(f"k asks for {max(k)} neighbours, but there are only {len(bank)} labelled images")
    rank, world = place()
    bank = F.normalize(bank.float(), dim=-1)
    num_classes = int(bank_labels.max()) + 1
    counts = tuple(dict.fromkeys(k))  # each k once, also where one is given twice
    correct = torch.zeros(len(counts), dtype=torch.int64, device=bank.device)
    chunk = min(chunk, -(-len(queries) // world))
    for start in range(rank * chunk, len(queries), world * chunk):
        query, label = queries[start : start + chunk], labels[start : start + chunk]
        similarity, index = (F.normalize(query.float(), dim=-1) @ bank.T).topk(max(k), dim=-1)
        weights, neighbours = (similarity / temperature).exp(), bank_labels[index]
        for at, count in enumerate(counts):
            votes = weights.new_zeros(len(query), num_classes)
            votes.scatter_add_(1, neighbours[:, :count], weights[:, :count])
            correct[at] += (votes.argmax(dim=-1) == label).sum()
    if world > 1:
        dist.all_reduce(correct)
    return {count: 100.0 * hits / len(labels) for count, hits in zip(counts, correct.tolist(), strict=True)}


def evaluate_knn(sets: FeatureSets, settings: KnnSettings) -> KnnReport:
    """Returns k-NN accuracies of every model; every rank must call it.

    Held-out images have the other training images as neighbours, test images all of them.

    Raises:
        ValueError: there are fewer images than neighbours.
    """

    def accuracies(bank: LabelledFeatures, queries: LabelledFeatures | None) -> Accuracies:
        found: dict[str, dict[str, dict[Setting, float]]] = {}
        for model, pooling in sets.tables() if queries is not None else ():
            assert queries is not None
            images = (bank.tables[model][pooling], bank.labels, queries.tables[model][pooling], queries.labels)
            on_device = [values.to(sets.device) for values in images]
            by_k = knn_accuracy(*on_device, k=settings.k, temperature=settings.temperature)
            found.setdefault(model, {})[pooling] = {k: percent for k, percent in by_k.items()}
        return found

    return KnnReport(holdout=accuracies(sets.bank, sets.held_out), test=accuracies(sets.train, sets.test))
