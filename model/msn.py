"""MSN: masked siamese networks (Assran et al., arXiv 2204.07141).

A target view, whole, and anchor views of the same image, masked or small, are softly assigned to prototypes.  Each
anchor's assignment is compared with the target's, which an average of encoder and head makes and which is sharpened.
Both sides share the prototypes, which learn from the anchors alone.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestri.model.assignment import cross_entropy, me_max, rank_me, sinkhorn
from maestri.model.batch_norm import BatchNorm
from maestri.model.encoder import Encoder
from maestri.model.levels import MomentumConfig, level_monitors, linear_momentum
from maestri.model.method import Teacher, ViewFacts
from maestri.pipelines.batch import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class MsnConfig:
    """MSN (arXiv 2204.07141); the defaults are the authors' for ViT-S/16."""

    hidden: int = 2048
    """Width of the head's two hidden layers."""
    projection: int = 256
    """Width of the normalised projection, and of prototypes."""
    prototypes: int = 1024
    """Pseudo classes K."""
    temperature: float = 0.1
    """τ of the assignments to prototypes."""
    sharpening: float = 0.25
    """T of the targets, in (0, 1]: p to the power of 1 / T, normalised; the same as an assignment at τ · T."""
    balance: Literal["sinkhorn", "none"] = "sinkhorn"
    """Whether the sharpened targets of a batch are balanced over prototypes."""
    sinkhorn_iterations: int = 3
    """Pairs of normalisations under ``balance: sinkhorn``."""
    me_max: float = 1.0
    """Weight of log K − H(mean assignment of anchors), which keeps them from collapse."""
    momentum: MomentumConfig = field(default_factory=MomentumConfig)
    """EMA of encoder and head; it rises linearly."""

    def __post_init__(self) -> None:
        for name in ("hidden", "projection", "sinkhorn_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"msn.{name} is {getattr(self, name)}; it must be at least 1")
        if self.prototypes < 2:
            raise ValueError(f"msn.prototypes is {self.prototypes}; at least 2 are needed")
        if self.temperature <= 0:
            raise ValueError(f"msn.temperature is {self.temperature}; it must be above 0")
        if not 0 < self.sharpening <= 1:
            raise ValueError(f"msn.sharpening is {self.sharpening}; it must be above 0 and at most 1")
        if self.me_max < 0:
            raise ValueError(f"msn.me_max is {self.me_max}; a weight of the loss must be at least 0")


def check_views(config: MsnConfig, facts: ViewFacts) -> None:
    """Raises ValueError where the views lack what MSN needs, or carry what it would ignore."""
    facts.refuse_corruption("msn")
    facts.need_hidden("msn", at_least=0)
    if facts.num_views < 2:
        raise ValueError(
            f"views.count is {facts.num_views}; method msn takes view 0 as the target and the others as anchors: "
            "at least 2 are needed"
        )


class MsnStudent(nn.Module):
    """Encoder, head and prototypes."""

    def __init__(self, encoder: Encoder, config: MsnConfig) -> None:
        super().__init__()
        self.encoder = encoder
        hidden, output = config.hidden, config.projection
        self.head = nn.Sequential(
            *(nn.Linear(encoder.embed_dim, hidden), BatchNorm(hidden), nn.GELU()),
            *(nn.Linear(hidden, hidden), BatchNorm(hidden), nn.GELU()),
            nn.Linear(hidden, output),
        )
        for module in self.head:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.prototypes = nn.Parameter(torch.empty(config.prototypes, output))
        nn.init.uniform_(self.prototypes, -(output**-0.5), output**-0.5)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the anchors' scores, and what the target's need; view 0 of the global views is no anchor.

        ``scores``, float32 cosine similarities (``anchor·batch proto``: global views' visible tokens, then whole local
        views), ``prototypes``, unit vectors (``proto dim``, float32), and ``class_token`` (``anchor·batch dim``, of
        global views) for monitoring.  Views of one size are one batch to the head's batch norm.
        """
        images, visible = (group["global"][1:].flatten(0, 1) for group in (batch.views, batch.visible))
        class_token = self.encoder(images, visible)[:, 0]
        projections = [_project(self.head, class_token)]
        if "local" in batch.views:
            projections.append(_project(self.head, self.encoder(batch.views["local"].flatten(0, 1))[:, 0]))
        prototypes = F.normalize(self.prototypes.float(), dim=-1)
        scores = torch.cat(projections) @ prototypes.T
        return {"scores": scores, "prototypes": prototypes, "class_token": class_token}


class Msn:
    """The method: soft assignments of anchors, compared with those of targets."""

    inherits: tuple[str, ...] = ()

    def __init__(self, encoder: Encoder, config: MsnConfig, *, num_steps: int) -> None:
        self.student = MsnStudent(encoder, config)
        names = ("encoder", "head")
        module = nn.ModuleDict({name: copy.deepcopy(self.student.get_submodule(name)) for name in names})
        # In eval mode only drop-path is off: its batch norm, too, goes by the micro-batch.
        self.teachers = {
            "target_teacher": Teacher(
                module=module.requires_grad_(False).eval(),
                follows=tuple(f"{name}." for name in names),
                momentum=linear_momentum(config.momentum, num_steps),
            )
        }
        self.state = nn.Module()
        self._config = config

    def targets(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Returns ``projections``: unit vectors of the whole view 0, float32 ``batch dim``.

        Their assignment belongs to the loss, for the prototypes are the student's.
        """
        teacher = self.teachers["target_teacher"].module
        class_token = teacher.get_submodule("encoder")(batch.views["global"][0])[:, 0]
        return {"projections": _project(teacher.get_submodule("head"), class_token)}

    def loss(
        self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the mean cross-entropy of all anchors with their targets, plus weighted ME-MAX, and both."""
        config, scores = self._config, outputs["scores"]
        labels = self._labels(_target_scores(outputs, targets))
        labels = labels.repeat(len(scores) // len(labels), 1)
        loss = cross_entropy(labels, scores, temperature=config.temperature).mean()
        metrics = {"loss_class": loss.detach()}
        if config.me_max:
            spread = me_max(scores, temperature=config.temperature)
            loss = loss + config.me_max * spread
            metrics["me_max_class"] = spread.detach()
        return loss, metrics

    def monitors(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what tells of collapse: the level's monitors, before balancing, and RankMe of the class token."""
        of_targets, temperature = _target_scores(outputs, targets), self._config.temperature
        figures = level_monitors("class", student=outputs["scores"], teacher=of_targets, temperature=temperature)
        return figures | {"rank_me": rank_me(outputs["class_token"])}

    def _labels(self, scores: Tensor) -> Tensor:
        """Returns sharpened assignments, balanced where that is on, ``batch proto``."""
        config = self._config
        temperature = config.temperature * config.sharpening
        if config.balance == "none":
            return torch.softmax(scores / temperature, dim=-1)
        return sinkhorn(scores, temperature=temperature, iterations=config.sinkhorn_iterations, start="probabilities")


def _project(head: nn.Module, class_token: Tensor) -> Tensor:
    """Returns unit vectors, float32 ``sample dim``, whose samples of all ranks are one batch to the batch norm."""
    projection: Tensor = head(class_token[None])[0]
    return F.normalize(projection.float(), dim=-1)


@torch.no_grad()
def _target_scores(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """Returns the target view's similarities to the student's prototypes, float32 ``batch proto``."""
    return targets["projections"] @ outputs["prototypes"].T
