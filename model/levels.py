"""One level of pseudo labels, of images or of patches: its settings, its loss, and what watches it for collapse."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maestri.model.assignment import (
    Assigner,
    Balance,
    SinkhornStart,
    cross_entropy,
    me_max,
    mutual_information,
    prototypes_used,
)
from maestri.model.collectives import sum_over_ranks, world_size
from maestri.model.heads import HeadConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelConfig:
    """One level of pseudo labels: of images (class token) or of patches (data tokens)."""

    weight: float = 1.0
    """Weight of this level's cross-entropy in the loss; 0 leaves the level out."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """Projection and prototypes; the student's and, by EMA, the labelling teacher's."""
    balance: Balance = "sinkhorn"
    """What keeps the teacher's labels from collapse."""
    sinkhorn_iterations: int = 3
    """Pairs of normalisations under ``balance: sinkhorn``."""
    sinkhorn_start: SinkhornStart = "scores"
    """What Sinkhorn balances: exp(score / temperature), in which samples of higher scores weigh more at first (SwAV),
    or the softmax of each sample (``probabilities``, MSN)."""
    centre_momentum: float = 0.9
    """How much of the centre stays at each micro-step under ``balance: centring``."""
    me_max: float = 0.0
    """Weight of log K − H(mean student prediction), which keeps the student's predictions from collapse."""

    def __post_init__(self) -> None:
        for name in ("weight", "me_max"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; a weight of the loss must be at least 0")
        if self.sinkhorn_iterations < 1:
            raise ValueError(f"sinkhorn_iterations is {self.sinkhorn_iterations}; expected at least 1")
        if not 0 <= self.centre_momentum < 1:
            raise ValueError(f"centre_momentum is {self.centre_momentum}; expected at least 0 and below 1")
        if self.me_max and not self.weight:
            raise ValueError(
                f"me_max is {self.me_max}, but the level has weight 0 and is left out; set me_max to 0 too"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MomentumConfig:
    """m of a teacher, from ``start`` to ``end`` over the run: along half a cosine, MSN's along a line."""

    start: float = 0.996
    """m at the first step; a half-life is log 2 / (1 − m) steps."""
    end: float = 1.0
    """m at the last step."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.start <= 1.0 or not 0.0 <= self.end <= 1.0:
            raise ValueError(f"momentum runs from {self.start} to {self.end}; both must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class TemperatureConfig:
    """Temperatures of the softmaxes over prototypes."""

    student: float = 0.1
    """Of the student's predictions."""
    teacher_start: float = 0.04
    """Of the labels at the first step."""
    teacher_end: float = 0.07
    """Of the labels after the warm-up."""
    warmup: float = 0.1
    """Fraction of the run over which the labels' temperature rises, linearly."""

    def __post_init__(self) -> None:
        for name in ("student", "teacher_start", "teacher_end"):
            if getattr(self, name) <= 0:
                raise ValueError(f"temperature.{name} is {getattr(self, name)}; it must be above 0")
        if not 0.0 <= self.warmup <= 1.0:
            raise ValueError(f"temperature.warmup is {self.warmup}; it is a fraction of the run, in [0, 1]")


def new_assigner(level: LevelConfig) -> Assigner:
    """Returns the balance device of a level, with a centre of zeros."""
    return Assigner(
        level.balance,
        num_prototypes=level.head.prototypes,
        center_momentum=level.centre_momentum,
        iterations=level.sinkhorn_iterations,
        start=level.sinkhorn_start,
    )


def level_loss(
    name: str,
    level: LevelConfig,
    *,
    labels: Tensor,
    scores: Tensor,
    temperature: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the weighted loss of a level (cross-entropy, and ME-MAX where it is on), and its parts as metrics.

    Args:
        name: of the level, in the metrics' names.
        level: its settings.
        labels: float32 ``… proto``, rows sum to 1.
        scores: the student's, ``… proto``.
        temperature: of the student's predictions.
        weights: of the samples in the cross-entropy, ``…``, at least 0; alike when None.  ME-MAX is over all samples.
    """
    labels, scores = labels.flatten(0, -2), scores.flatten(0, -2)
    entropies = cross_entropy(labels, scores, temperature=temperature)
    entropy = entropies.mean() if weights is None else weighted_mean(entropies, weights.flatten())
    total, metrics = level.weight * entropy, {f"loss_{name}": entropy.detach()}
    if level.me_max:
        spread = me_max(scores, temperature=temperature)
        total = total + level.me_max * spread
        metrics[f"me_max_{name}"] = spread.detach()
    return total, metrics


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Returns Σ weight · value of this rank over the ranks' mean Σ weight, for two tensors of one shape.

    Ranks may hold different weight, e.g. numbers of corrupted pixels: the mean of their results, and so of their
    gradients, is still what one rank would get from all samples.
    """
    total = sum_over_ranks(weights.sum()) / world_size()
    return (values * weights).sum() / total.clamp_min(1e-12)


def level_monitors(name: str, *, student: Tensor, teacher: Tensor, temperature: float) -> dict[str, Tensor]:
    """Returns what tells of a level's collapse, of student's and teacher's scores ``… proto`` before balancing.

    At one temperature for both, so that they can be compared, and with other runs.
    """
    figures: dict[str, Tensor] = {}
    for role, scores in (("student", student), ("teacher", teacher)):
        flat = scores.flatten(0, -2)
        information, entropy = mutual_information(flat, temperature=temperature)
        figures[f"information_{name}_{role}"] = information
        figures[f"entropy_{name}_{role}"] = entropy
        figures[f"used_{name}_{role}"] = prototypes_used(flat)
    return figures


def teacher_temperature(settings: TemperatureConfig, progress: float) -> float:
    """Returns the temperature of the labels at ``progress`` (0–1) through the run."""
    share = min(1.0, progress / settings.warmup) if settings.warmup else 1.0
    return settings.teacher_start + share * (settings.teacher_end - settings.teacher_start)


def cosine_momentum(config: MomentumConfig, num_steps: int) -> Callable[[int], float]:
    """Returns step → m, from ``start`` to ``end`` along half a cosine over ``num_steps``."""

    def momentum(step: int) -> float:
        progress = min(1.0, step / max(1, num_steps))
        return config.end - (config.end - config.start) * (1 + math.cos(math.pi * progress)) / 2

    return momentum


def linear_momentum(config: MomentumConfig, num_steps: int) -> Callable[[int], float]:
    """Returns step → m, from ``start`` to ``end`` along a line over ``num_steps``."""

    def momentum(step: int) -> float:
        progress = min(1.0, step / max(1, num_steps))
        return config.start + progress * (config.end - config.start)

    return momentum


def other_views(labels: Tensor, num_views: int) -> Tensor:
    """Returns for each view the mean of the others' labels, ``view·batch proto``.

    A cross-entropy is linear in its labels, so this is the mean over all pairs of different views.
    """
    by_view = labels.view(num_views, -1, labels.shape[-1])
    others: Tensor = (by_view.sum(dim=0) - by_view) / (num_views - 1)
    return others.flatten(0, 1)


def cross_view_labels(labels: Tensor, *, num_views: int, num_local: int) -> tuple[Tensor, Tensor]:
    """Returns the labels that each of the student's views is compared with, and the views' weights.

    The student's views are the ``num_views`` global ones, that the teacher labels too, and ``num_local`` local ones.
    A pair is one of them and *another* view of the teacher's; a view's labels are the mean over its pairs, and its
    weight is their number.  A cross-entropy is linear in its labels, so the weighted mean over views is the mean over
    pairs.

    Args:
        labels: the teacher's, ``view·batch proto``.
        num_views: global views.
        num_local: local views.

    Returns:
        Labels ``view·batch proto``, global views, then local ones; weights float32 ``view·batch``.
    """
    by_view = labels.view(num_views, -1, labels.shape[-1])
    total = by_view.sum(dim=0)
    of_global = (total - by_view) / max(1, num_views - 1)
    of_local = (total / num_views).expand(num_local, *total.shape)
    size = by_view.shape[1]
    # Made on the device: a copy from the host would wait for all that the device has still to do.
    pairs = torch.full(((num_views + num_local) * size,), float(num_views), device=labels.device)
    pairs[: num_views * size] = num_views - 1.0
    return torch.cat([of_global, of_local]).flatten(0, 1), pairs
