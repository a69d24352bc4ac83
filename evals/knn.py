"""Weighted k-nearest-neighbour classification of frozen features, as in DINO (arXiv 2104.14294)."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Returns top-1 accuracy in percent for each k.

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
        raise ValueError(f"evaluation.k asks for {max(k)} neighbours, but there are only {len(bank)} labelled images")
    bank = F.normalize(bank.float(), dim=-1)
    num_classes = int(bank_labels.max()) + 1
    correct = dict.fromkeys(k, 0)
    for start in range(0, len(queries), chunk):
        query, label = queries[start : start + chunk], labels[start : start + chunk]
        similarity, index = (F.normalize(query.float(), dim=-1) @ bank.T).topk(max(k), dim=-1)
        weights, neighbours = (similarity / temperature).exp(), bank_labels[index]
        for count in correct:  # each k once, also where one is given twice
            votes = weights.new_zeros(len(query), num_classes)
            votes.scatter_add_(1, neighbours[:, :count], weights[:, :count])
            correct[count] += int((votes.argmax(dim=-1) == label).sum())
    return {count: 100.0 * hits / len(labels) for count, hits in correct.items()}
