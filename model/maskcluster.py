"""MaskCluster: clustering of several corrupted views, beside their reconstruction (arXiv 2406.17460).

The student sees global views of which groups of pixels are corrupted, every token of them, and small local views.  A
teacher, an EMA of encoder and heads, sees the clean global views and gives pseudo labels of images (class token) and of
patches; a light head gives back the pixels that were corrupted, as in GMML (arXiv 2205.14986).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestri.model.assignment import Assigner, rank_me
from maestri.model.encoder import Encoder, normalise, to_patches
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
    weighted_mean,
)
from maestri.model.method import Teacher, ViewFacts
from maestri.pipelines.batch import Batch


def _level() -> LevelConfig:
    return LevelConfig(head=HeadConfig(prototypes=1024))


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskclusterConfig:
    """MaskCluster (arXiv 2406.17460).  docs/methods.md says which defaults are the paper's and which are ours."""

    class_level: LevelConfig = field(default_factory=_level)
    """Pseudo labels of the class token, those of the other views."""
    patch_level: LevelConfig = field(default_factory=_level)
    """Pseudo labels of patch tokens, same view, same position."""
    patch_positions: Literal["all", "corrupted"] = "all"
    """Where the cross-entropy of patches is taken: at every token, or at those of which a pixel is corrupted."""
    reconstruction_weight: float = 1.0
    """Weight of the L1 loss on corrupted pixels; 0 leaves reconstruction out."""
    temperature: TemperatureConfig = field(default_factory=TemperatureConfig)
    """Temperatures of both levels."""
    momentum: MomentumConfig = field(default_factory=MomentumConfig)
    """EMA of the teacher: encoder and heads."""

    def __post_init__(self) -> None:
        if self.reconstruction_weight < 0:
            raise ValueError(
                f"maskcluster.reconstruction_weight is {self.reconstruction_weight}; a weight of the loss must be at "
                "least 0"
            )
        if self.class_level.weight + self.patch_level.weight + self.reconstruction_weight == 0:
            raise ValueError(
                "maskcluster: class_level.weight, patch_level.weight and reconstruction_weight are all 0; nothing is "
                "learnt"
            )


def check_views(config: MaskclusterConfig, facts: ViewFacts) -> None:
    """Raises ValueError where the views lack what MaskCluster needs, or carry what it would ignore."""
    if not facts.corrupted:
        raise ValueError(
            "views.corruption.coverage is 0; method maskcluster looks at corrupted views; set it above 0, e.g. to 0.5"
        )
    if config.class_level.weight:
        facts.need_pairs("method.maskcluster.class_level", instead=" (or set its weight to 0)")
    if facts.num_local and not config.class_level.weight:
        raise ValueError(
            f"views.local.count is {facts.num_local}, but method.maskcluster.class_level.weight is 0, and local views "
            "have no other loss; set views.local.count to 0"
        )


class MaskclusterStudent(nn.Module):
    """Encoder, and the heads that the configuration asks for."""

    def __init__(self, encoder: Encoder, config: MaskclusterConfig) -> None:
        super().__init__()
        dim = encoder.embed_dim
        self.encoder = encoder
        self.class_head = Head(config.class_level.head, input_dim=dim) if config.class_level.weight else None
        self.patch_head = Head(config.patch_level.head, input_dim=dim) if config.patch_level.weight else None
        # The last layer is GMML's transposed convolution: with stride = patch it is a linear map of each token.
        self.pixel_head = (
            nn.Sequential(
                nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 3 * encoder.patch**2)
            )
            if config.reconstruction_weight
            else None
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Returns scores and pixels, all view-major in their first axis.

        ``class_scores`` (``view·batch proto``, global views, then local ones), ``patch_scores`` (``view·batch token
        proto``), ``pixels`` (``view·batch token 3·patch·patch``), and ``class_token`` (``view·batch dim``, of global
        views) for monitoring.
        """
        tokens = self.encoder(batch.views["global_corrupted"].flatten(0, 1))
        outputs = {"class_token": tokens[:, 0]}
        if self.class_head is not None:
            class_tokens = tokens[:, 0]
            if "local" in batch.views:
                local = self.encoder(batch.views["local"].flatten(0, 1))
                class_tokens = torch.cat([class_tokens, local[:, 0]])
            outputs["class_scores"] = self.class_head(class_tokens)
        if self.patch_head is not None:
            outputs["patch_scores"] = self.patch_head(tokens[:, 1:])
        if self.pixel_head is not None:
            outputs["pixels"] = self.pixel_head(tokens[:, 1:])
        return outputs


class Maskcluster:
    """The method: pseudo labels of the teacher, losses of the student."""

    inherits: tuple[str, ...] = ()

    def __init__(self, encoder: Encoder, config: MaskclusterConfig, *, num_steps: int) -> None:
        self.student = MaskclusterStudent(encoder, config)
        self.teachers = _teachers(self.student, config, num_steps=num_steps)
        self.state = nn.ModuleDict(
            {f"{name}_level": new_assigner(level) for name, level in _levels(config).items() if level.weight}
        )
        self._config = config
        self._patch = encoder.patch
        self._num_steps = num_steps

    def targets(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Returns the teacher's scores and labels, the clean pixels, and weights that say which of them count.

        Class labels are those that each view is compared with, the mean over the other global views.
        """
        images = batch.views["global"].flatten(0, 1)
        temperature = teacher_temperature(self._config.temperature, step / self._num_steps)
        targets: dict[str, Tensor] = {}
        if self.teachers:
            teacher = self.teachers["teacher"].module
            tokens = teacher.get_submodule("encoder")(images)
            if self._config.class_level.weight:
                scores = teacher.get_submodule("class_head")(tokens[:, 0])
                num_local = len(batch.views["local"]) if "local" in batch.views else 0
                labels, weights = cross_view_labels(
                    self._labels("class", scores, temperature),
                    num_views=len(batch.views["global"]),
                    num_local=num_local,
                )
                targets |= {"class_scores": scores, "class_labels": labels, "class_weights": weights}
            if self._config.patch_level.weight:
                scores = teacher.get_submodule("patch_head")(tokens[:, 1:])
                labels = self._labels("patch", scores.flatten(0, 1), temperature).view(scores.shape)
                targets |= {"patch_scores": scores, "patch_labels": labels}
                if self._config.patch_positions == "corrupted":
                    targets["patch_weights"] = batch.token_mask["global"].flatten(0, 1).float()
        if self._config.reconstruction_weight:
            targets["pixels"] = normalise(to_patches(images, self._patch), dim=2).flatten(2)
            targets["pixel_weights"] = _pixel_weights(batch, self._patch)
        return targets

    def loss(
        self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the weighted sum of both cross-entropies (and ME-MAX terms) and the L1 loss, and each of them."""
        total = outputs["class_token"].new_zeros((), dtype=torch.float32)
        metrics: dict[str, Tensor] = {}
        for name, level in _levels(self._config).items():
            if not level.weight:
                continue
            loss, parts = level_loss(
                name,
                level,
                labels=targets[f"{name}_labels"],
                scores=outputs[f"{name}_scores"],
                temperature=self._config.temperature.student,
                weights=targets.get(f"{name}_weights"),
            )
            total = total + loss
            metrics |= parts
        if self._config.reconstruction_weight:
            weights = targets["pixel_weights"]
            errors = F.l1_loss(outputs["pixels"].float(), targets["pixels"], reduction="none")
            by_pixel = errors.view(*weights.shape[:2], 3, -1).mean(dim=2)
            loss = weighted_mean(by_pixel, weights)
            total = total + self._config.reconstruction_weight * loss
            metrics["loss_reconstruction"] = loss.detach()
        return total, metrics

    def monitors(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what tells of collapse: each level's monitors, before balancing, and RankMe of the class token."""
        figures = {"rank_me": rank_me(outputs["class_token"])}
        for name in _levels(self._config):
            if f"{name}_scores" in outputs:
                figures |= level_monitors(
                    name,
                    student=outputs[f"{name}_scores"],
                    teacher=targets[f"{name}_scores"],
                    temperature=self._config.temperature.student,
                )
        return figures

    def _labels(self, name: str, scores: Tensor, temperature: float) -> Tensor:
        assigner = self.state[f"{name}_level"]
        assert isinstance(assigner, Assigner)
        return assigner.labels(scores, temperature=temperature)


def _levels(config: MaskclusterConfig) -> dict[str, LevelConfig]:
    return {"class": config.class_level, "patch": config.patch_level}


def _pixel_weights(batch: Batch, patch: int) -> Tensor:
    """Returns 1 at corrupted pixels and 0 at clean ones, float32 ``view·batch token patch·patch``."""
    if "global" in batch.pixel_mask:
        mask = batch.pixel_mask["global"].flatten(0, 1)
        return to_patches(mask[:, None], patch).flatten(2).float()
    return batch.token_mask["global"].flatten(0, 1)[..., None].float().expand(-1, -1, patch**2)


def _teachers(student: MaskclusterStudent, config: MaskclusterConfig, *, num_steps: int) -> dict[str, Teacher]:
    heads = [f"{name}_head" for name, level in _levels(config).items() if level.weight]
    if not heads:
        return {}
    names = ["encoder", *heads]
    module = nn.ModuleDict({name: copy.deepcopy(student.get_submodule(name)) for name in names})
    # Eval mode: the student's drop-path is no part of the labels.
    teacher = Teacher(
        module=module.requires_grad_(False).eval(),
        follows=tuple(f"{name}." for name in names),
        momentum=cosine_momentum(config.momentum, num_steps),
    )
    return {"teacher": teacher}
