"""Linear probe of frozen features: many learning rates trained at once, in one pass over features that are kept."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from maestri.evals.protocol import Accuracies, AccuracyReport, FeatureSets, LabelledFeatures
from maestri.evals.sharing import place, shared_out

LARGEST_BATCH = 1024
SMALLEST_BATCH = 32
STEPS_PER_EPOCH = 50
"""Small sets get smaller batches, down to the smallest, to take at least so many steps an epoch."""
MOMENTUM = 0.9
BATCH_OF_RATES = 256
"""Images that learning rates are given for; they grow linearly with the batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSettings:
    """How probes are trained."""

    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Learning rates at 256 images per step, each with a probe of its own."""
    epochs: int = 30
    """Passes over the training images."""

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0:
            raise ValueError(f"rates is {list(self.rates)}; give at least one learning rate, each above 0")
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}; it must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearReport(AccuracyReport):
    """Linear probes': settings are learning rates."""

    setting: ClassVar[str] = "rate"
    batch_size: int = field(default=0)
    """Images per step of the probes that classify test images."""


class Probes(nn.Module):
    """Linear classifiers side by side, one a learning rate, behind one batch norm without affine parameters."""

    def __init__(self, *, num_rates: int, dim: int, num_classes: int) -> None:
        """All weights start at 0: the problem is convex."""
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.weight = nn.Parameter(torch.zeros(num_rates, dim, num_classes))
        self.bias = nn.Parameter(torch.zeros(num_rates, num_classes))

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits, ``batch rate class``, of float32 ``batch dim``."""
        return torch.einsum("bd,rdc->brc", self.norm(features), self.weight) + self.bias

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor, *, chunk: int = 4096) -> list[float]:
        """Returns top-1 accuracy in percent of each probe."""
        self.eval()
        correct = torch.zeros(len(self.weight), dtype=torch.int64, device=self.weight.device)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            guesses = self(features[part].float()).argmax(dim=-1)
            correct += (guesses == labels[part, None]).sum(dim=0)
        return [100.0 * hits / len(labels) for hits in correct.tolist()]


def batch_size(num_images: int) -> int:
    """Returns images per step for a training set: a power of two."""
    wanted = 1 << (max(1, num_images // STEPS_PER_EPOCH).bit_length() - 1)
    return min(LARGEST_BATCH, max(SMALLEST_BATCH, wanted), num_images)


def train_probes(
    features: Tensor, labels: Tensor, *, num_classes: int, rates: tuple[float, ...], epochs: int, seed: int
) -> Probes:
    """Returns a trained probe for each learning rate: SGD with momentum 0.9, no weight decay, half a cosine to 0.

    Args:
        features: float ``sample dim``; probes are trained where they are.
        labels: int64 ``sample``, on the same device.
        num_classes: classes.
        rates: learning rates at 256 images per step.
        epochs: passes over the images.
        seed: of their order, which is the same for all rates.
    """
    count, size = len(labels), batch_size(len(labels))
    steps = max(1, count // size)  # the last, smaller batch is left out, another one each epoch
    probes = Probes(num_rates=len(rates), dim=features.shape[1], num_classes=num_classes).to(features.device).train()
    # SGD's update is linear in the gradient: a loss weighted by a rate makes steps of that rate.
    weights = torch.tensor(rates, device=features.device) * (size / BATCH_OF_RATES)
    optimizer = torch.optim.SGD(probes.parameters(), lr=1.0, momentum=MOMENTUM)
    cosine = LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / (steps * epochs))))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        for step in range(steps):
            rows = order[step * size : (step + 1) * size].to(features.device)
            logits = probes(features[rows].float())
            targets = labels[rows, None].expand(-1, len(rates))
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            loss = (losses.view(len(rows), -1).mean(dim=0) * weights).sum()
            optimizer.zero_grad()
            loss.backward()  # torch's
            optimizer.step()
            cosine.step()
    return probes


def evaluate_linear(sets: FeatureSets, settings: LinearSettings, *, seed: int) -> LinearReport:
    """Returns accuracies of linear probes of every model and learning rate; every rank must call it.

    Held-out images are classified by probes trained on the other training images, test images by probes trained on all
    of them.  Rates are shared out over ranks.
    """
    return LinearReport(
        holdout=_accuracies(sets, sets.bank, sets.held_out, settings, seed),
        test=_accuracies(sets, sets.train, sets.test, settings, seed),
        batch_size=batch_size(len(sets.train.labels)),
    )


def _accuracies(
    sets: FeatureSets,
    learnt: LabelledFeatures,
    classified: LabelledFeatures | None,
    settings: LinearSettings,
    seed: int,
) -> Accuracies:
    if classified is None:
        return {}
    _, world = place()
    shares = [settings.rates[rank::world] for rank in range(min(world, len(settings.rates)))]
    found: dict[str, dict[str, Mapping[int | float, float]]] = {}
    for model, pooling in sets.tables():
        of_table = partial(_probe, sets, learnt, classified, settings, seed, (model, pooling))
        by_rate = {
            rate: percent
            for rates, percents in zip(shares, shared_out(shares, of_table), strict=True)
            for rate, percent in zip(rates, percents, strict=True)
        }
        found.setdefault(model, {})[pooling] = {rate: by_rate[rate] for rate in settings.rates}
    return found


def _probe(
    sets: FeatureSets,
    learnt: LabelledFeatures,
    classified: LabelledFeatures,
    settings: LinearSettings,
    seed: int,
    table: tuple[str, str],
    rates: tuple[float, ...],
) -> list[float]:
    """Returns the accuracy of each rate's probe on one table, ``(model, pooling)``."""
    model, pooling = table
    features, queries = (part.tables[model][pooling].to(sets.device) for part in (learnt, classified))
    labels, answers = learnt.labels.to(sets.device), classified.labels.to(sets.device)
    probes = train_probes(
        features, labels, num_classes=sets.num_classes, rates=rates, epochs=settings.epochs, seed=seed
    )
    return probes.accuracy(queries, answers)
