"""DINO: a student's predictions of a teacher's pseudo labels, over views of two sizes (arXiv 2104.14294)."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from maestri.model.assignment import rank_me
from maestri.model.encoder import Encoder
from maestri.model.heads import Head, HeadConfig
from maestri.model.levels import (
    LevelConfig,
    MomentumConfig,
    TemperatureConfig,
    cosine_momentum,
    cross_view_labels,
    level_loss,
    level_monitors,
    new_assigner,
    teacher_temperature,
)
from maestri.model.method import Teacher, ViewFacts
from maestri.pipelines.batch import Batch


def _class_level() -> LevelConfig:
    return LevelConfig(head=HeadConfig(prototypes=65536), balance="centring")


@dataclass(frozen=True, kw_only=True, slots=True)
class DinoConfig:
    """DINO (arXiv 2104.14294); the defaults are the paper's.  docs/methods.md tells where we differ."""

    class_level: LevelConfig = field(default_factory=_class_level)
    """Pseudo labels of the class token, those of the other views."""
    temperature: TemperatureConfig = field(default_factory=TemperatureConfig)
    """Temperatures of predictions and labels."""
    momentum: MomentumConfig = field(default_factory=MomentumConfig)
    """EMA of the teacher: encoder and head."""

    def __post_init__(self) -> None:
        if not self.class_level.weight:
            raise ValueError("dino.class_level.weight is 0, and DINO has no other loss; set it above 0")


def check_views(config: DinoConfig, facts: ViewFacts) -> None:
    """Raises ValueError where the views lack what DINO needs, or carry what it would ignore."""
    facts.refuse_corruption("dino")
    if facts.num_masked != 0:
        raise ValueError("views.mask.ratio hides tokens, but method dino looks at all of them; set it to 0")
    facts.need_pairs("method dino")


class DinoStudent(nn.Module):
    """Encoder and head."""

    def __init__(self, encoder: Encoder, config: DinoConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.class_head = Head(config.class_level.head, input_dim=encoder.embed_dim)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Returns scores and what is watched, view-major in their first axis.

        ``class_scores`` (``view·batch proto``, global views, then local ones), and ``class_token`` (``view·batch dim``,
        of global views) for monitoring.
        """
        class_token = self.encoder(batch.views["global"].flatten(0, 1))[:, 0]
        class_tokens = class_token
        if "local" in batch.views:
            local = self.encoder(batch.views["local"].flatten(0, 1))
            class_tokens = torch.cat([class_token, local[:, 0]])
        return {"class_scores": self.class_head(class_tokens), "class_token": class_token}


class Dino:
    """The method: pseudo labels of the teacher, which sees global views, and their cross-entropy."""

    inherits: tuple[str, ...] = ()

    def __init__(self, encoder: Encoder, config: DinoConfig, *, num_steps: int) -> None:
        self.student = DinoStudent(encoder, config)
        # Eval mode: the student's drop-path is no part of the labels.
        self.teachers = {
            "teacher": Teacher(
                module=copy.deepcopy(self.student).requires_grad_(False).eval(),
                follows=("encoder.", "class_head."),
                momentum=cosine_momentum(config.momentum, num_steps),
            )
        }
        self._assigner = new_assigner(config.class_level)
        self.state = nn.ModuleDict({"class_level": self._assigner})
        self._config = config
        self._num_steps = num_steps

    def targets(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Returns the teacher's scores, the labels that each view is compared with, and the views' weights.

        A view's labels are the mean over the *other* global views, its weight is their number.
        """
        teacher = self.teachers["teacher"].module
        tokens = teacher.get_submodule("encoder")(batch.views["global"].flatten(0, 1))
        scores = teacher.get_submodule("class_head")(tokens[:, 0])
        temperature = teacher_temperature(self._config.temperature, step / self._num_steps)
        labels, weights = cross_view_labels(
            self._assigner.labels(scores, temperature=temperature),
            num_views=len(batch.views["global"]),
            num_local=len(batch.views["local"]) if "local" in batch.views else 0,
        )
        return {"class_scores": scores, "class_labels": labels, "class_weights": weights}

    def loss(
        self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the cross-entropy over all pairs of different views (equation 3), and ME-MAX where it is on."""
        return level_loss(
            "class",
            self._config.class_level,
            labels=targets["class_labels"],
            scores=outputs["class_scores"],
            temperature=self._config.temperature.student,
            weights=targets["class_weights"],
        )

    def monitors(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what tells of collapse: the level's monitors, before balancing, and RankMe of the class token."""
        figures = level_monitors(
            "class",
            student=outputs["class_scores"],
            teacher=targets["class_scores"],
            temperature=self._config.temperature.student,
        )
        return {"rank_me": rank_me(outputs["class_token"])} | figures
