"""iBOT: DINO's loss of class tokens, and one of masked patches in a teacher's vocabulary (arXiv 2111.07832).

The student sees global views of which hidden patches are replaced by a mask token, and small local views whole.  A
teacher, an EMA of encoder and heads, sees the global views whole: its head is the tokenizer of patches.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from maestri.model.assignment import cross_entropy, me_max, rank_me
from maestri.model.encoder import Encoder
from maestri.model.heads import Head
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


def _level() -> LevelConfig:
    return LevelConfig(balance="centring")


@dataclass(frozen=True, kw_only=True, slots=True)
class IbotConfig:
    """iBOT (arXiv 2111.07832); the defaults are the authors'.  docs/methods.md tells where we differ."""

    class_level: LevelConfig = field(default_factory=_level)
    """Pseudo labels of the class token, those of the other views."""
    patch_level: LevelConfig = field(default_factory=_level)
    """Pseudo labels of hidden patches, same view, same position."""
    shared_head: bool = True
    """Whether one head serves both levels, whose ``head`` sections are then equal, or each has its own."""
    temperature: TemperatureConfig = field(default_factory=TemperatureConfig)
    """Temperatures of the class token."""
    patch_temperature: TemperatureConfig = field(default_factory=TemperatureConfig)
    """Temperatures of patches."""
    momentum: MomentumConfig = field(default_factory=MomentumConfig)
    """EMA of the teacher: encoder and heads."""

    def __post_init__(self) -> None:
        if self.class_level.weight + self.patch_level.weight == 0:
            raise ValueError("ibot: class_level.weight and patch_level.weight are both 0; nothing is learnt")
        if self.shared_head and self.class_level.head != self.patch_level.head:
            raise ValueError(
                f"ibot.shared_head is true, but class_level.head is {self.class_level.head} and patch_level.head is "
                f"{self.patch_level.head}; make them equal, or set shared_head to false"
            )


def check_views(config: IbotConfig, facts: ViewFacts) -> None:
    """Raises ValueError where the views lack what iBOT needs, or carry what it would ignore."""
    facts.refuse_corruption("ibot")
    if config.patch_level.weight and facts.num_masked == 0:
        raise ValueError(
            "views.mask.ratio hides no token, but method.ibot.patch_level predicts hidden tokens; raise it (or set its "
            "weight to 0)"
        )
    if config.class_level.weight:
        facts.need_pairs("method.ibot.class_level", instead=" (or set its weight to 0)")
    if facts.num_local and not config.class_level.weight:
        raise ValueError(
            f"views.local.count is {facts.num_local}, but method.ibot.class_level.weight is 0, and local views have no "
            "other loss; set views.local.count to 0"
        )


class IbotStudent(nn.Module):
    """Encoder, mask token, and a head for both levels or one for each."""

    def __init__(self, encoder: Encoder, config: IbotConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        self.head_of = {level: "shared" if config.shared_head else level for level in _levels(config)}
        settings = {self.head_of[name]: level.head for name, level in _levels(config).items()}
        self.heads = nn.ModuleDict({name: Head(head, input_dim=encoder.embed_dim) for name, head in settings.items()})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Returns scores and what is watched, all view-major in their first axis.

        ``class_scores`` (``view·batch proto``, global views, then local ones), ``patch_scores`` (``view·batch token
        proto``, of global views), and ``class_token`` (``view·batch dim``, of global views) for monitoring.
        """
        images, hidden = (group["global"].flatten(0, 1) for group in (batch.views, batch.token_mask))
        tokens = self.encoder(images, replaced=hidden, mask_token=self.mask_token)
        class_tokens = tokens[:, 0]
        if "local" in batch.views:
            class_tokens = torch.cat([class_tokens, self.encoder(batch.views["local"].flatten(0, 1))[:, 0]])
        of_level = {"class": class_tokens, "patch": tokens[:, 1:]}
        scores = {f"{level}_scores": self.heads[head](of_level[level]) for level, head in self.head_of.items()}
        return scores | {"class_token": tokens[:, 0]}


class Ibot:
    """The method: pseudo labels of the teacher, losses of the student."""

    inherits: tuple[str, ...] = ()

    def __init__(self, encoder: Encoder, config: IbotConfig, *, num_steps: int) -> None:
        self.student = IbotStudent(encoder, config)
        self.teachers = {"teacher": _teacher(self.student, config, num_steps=num_steps)}
        self._assigners = {name: new_assigner(level) for name, level in _levels(config).items()}
        self.state = nn.ModuleDict({f"{name}_level": assigner for name, assigner in self._assigners.items()})
        self._config = config
        self._num_steps = num_steps

    def targets(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Returns the teacher's scores and labels, and weights that say how much each of them counts.

        Class labels are those that each view is compared with, the mean over the other global views.
        """
        config, progress = self._config, step / self._num_steps
        images, hidden = (group["global"].flatten(0, 1) for group in (batch.views, batch.token_mask))
        teacher = self.teachers["teacher"].module
        tokens = teacher.get_submodule("encoder")(images)
        heads = {level: teacher.get_submodule(f"heads.{head}") for level, head in self.student.head_of.items()}
        targets: dict[str, Tensor] = {}
        if "class" in heads:
            scores = heads["class"](tokens[:, 0])
            labels, weights = cross_view_labels(
                self._assigners["class"].labels(scores, temperature=teacher_temperature(config.temperature, progress)),
                num_views=len(batch.views["global"]),
                num_local=len(batch.views["local"]) if "local" in batch.views else 0,
            )
            targets |= {"class_scores": scores, "class_labels": labels, "class_weights": weights}
        if "patch" in heads:
            scores = heads["patch"](tokens[:, 1:])
            temperature = teacher_temperature(config.patch_temperature, progress)
            # The centre is of all patches, hidden from the student or not.
            labels = self._assigners["patch"].labels(scores.flatten(0, 1), temperature=temperature)
            weights = hidden / hidden.sum(dim=-1, keepdim=True).clamp_min(1)
            targets |= {"patch_scores": scores, "patch_labels": labels.view(scores.shape), "patch_weights": weights}
        return targets

    def loss(
        self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the weighted sum of both cross-entropies (and ME-MAX terms), and each of them."""
        total = outputs["class_token"].new_zeros((), dtype=torch.float32)
        metrics: dict[str, Tensor] = {}
        if "class" in self._assigners:
            loss, parts = level_loss(
                "class",
                self._config.class_level,
                labels=targets["class_labels"],
                scores=outputs["class_scores"],
                temperature=self._config.temperature.student,
                weights=targets["class_weights"],
            )
            total, metrics = total + loss, metrics | parts
        if "patch" in self._assigners:
            loss, parts = _patch_loss(self._config, outputs, targets)
            total, metrics = total + loss, metrics | parts
        return total, metrics

    def monitors(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what tells of collapse: each level's monitors, before balancing, and RankMe of the class token."""
        figures = {"rank_me": rank_me(outputs["class_token"])}
        temperatures = {"class": self._config.temperature, "patch": self._config.patch_temperature}
        for name in self._assigners:
            figures |= level_monitors(
                name,
                student=outputs[f"{name}_scores"],
                teacher=targets[f"{name}_scores"],
                temperature=temperatures[name].student,
            )
        return figures


def _levels(config: IbotConfig) -> dict[str, LevelConfig]:
    """Returns the levels that are part of the loss."""
    levels = {"class": config.class_level, "patch": config.patch_level}
    return {name: level for name, level in levels.items() if level.weight}


def _patch_loss(
    config: IbotConfig, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the weighted cross-entropy of hidden patches and ME-MAX where it is on, and its parts.

    A view's is the mean over its hidden patches, 0 where it hides none; the loss is the mean over all views, so those
    that hide nothing make it smaller, as the authors' code has it.
    """
    level, temperature = config.patch_level, config.patch_temperature.student
    scores = outputs["patch_scores"]
    entropies = cross_entropy(targets["patch_labels"], scores, temperature=temperature)
    entropy = (entropies * targets["patch_weights"]).sum(dim=-1).mean()
    total, metrics = level.weight * entropy, {"loss_patch": entropy.detach()}
    if level.me_max:
        spread = me_max(scores.flatten(0, 1), temperature=temperature)
        total = total + level.me_max * spread
        metrics["me_max_patch"] = spread.detach()
    return total, metrics


def _teacher(student: IbotStudent, config: IbotConfig, *, num_steps: int) -> Teacher:
    names = ("encoder", "heads")
    module = nn.ModuleDict({name: copy.deepcopy(student.get_submodule(name)) for name in names})
    # Eval mode: the student's drop-path is no part of the labels.
    return Teacher(
        module=module.requires_grad_(False).eval(),
        follows=tuple(f"{name}." for name in names),
        momentum=cosine_momentum(config.momentum, num_steps),
    )
