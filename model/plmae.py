"""PL-MAE: pseudo labelling for enhanced masked autoencoders (arXiv 2406.17450), with one or two teachers.

The student encodes visible tokens.  A labelling teacher, an EMA of encoder and heads, sees the whole view and gives
pseudo labels for the class token and for data (patch) tokens; a reconstruction teacher, an EMA of the encoder with
its own schedule, gives discrete tokens that a decoder predicts at hidden positions.
"""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestri.model.assignment import Assigner, cross_entropy, rank_me
from maestri.model.codebook import Codebook
from maestri.model.decoder import Decoder
from maestri.model.encoder import Encoder, take
from maestri.model.heads import Head
from maestri.model.levels import (
    MomentumConfig,
    cosine_momentum,
    level_loss,
    level_monitors,
    new_assigner,
    other_views,
    teacher_temperature,
)
from maestri.model.method import Teacher, ViewFacts
from maestri.model.plmae_config import PlmaeConfig
from maestri.pipelines.batch import Batch


def check_views(config: PlmaeConfig, facts: ViewFacts) -> None:
    """Raises ValueError where the views lack what PL-MAE needs, or carry what it would ignore."""
    if config.class_level.weight and config.class_pairs == "cross" and facts.num_views < 2:
        raise ValueError(
            f"views.count is {facts.num_views}; method.plmae.class_pairs: cross needs at least 2 "
            "(or set class_pairs: same)"
        )
    facts.refuse_local("plmae")
    facts.refuse_corruption("plmae")
    facts.need_hidden("plmae", at_least=1 if config.uses_decoder else 0)


class PlmaeStudent(nn.Module):
    """Encoder, decoder and the heads that the configuration asks for."""

    def __init__(self, encoder: Encoder, config: PlmaeConfig) -> None:
        super().__init__()
        dim = encoder.embed_dim
        self._config = config
        self.encoder = encoder
        if config.class_level.weight:
            self.class_head = Head(config.class_level.head, input_dim=dim)
        if config.data_level.weight:
            self.data_head = Head(config.data_level.head, input_dim=dim)
        if config.uses_decoder:
            self.decoder = Decoder(config.decoder, input_dim=dim, output_dim=dim, num_tokens=encoder.num_tokens)
        if config.reconstruction.weight:
            self.reconstruction_head = _reconstruction_head(config, dim)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Returns scores, all view-major in their first axis.

        ``class_scores`` (``view·batch proto``), ``data_scores`` (``view·batch token proto``), ``reconstruction``
        (``view·batch masked code`` or ``dim``), and ``class_token`` (``view·batch dim``) for monitoring.
        """
        images, visible, masked = (
            group["global"].flatten(0, 1) for group in (batch.views, batch.visible, batch.masked)
        )
        config = self._config
        tokens = self.encoder(images, visible)
        decoded = self.decoder(tokens, visible, masked) if config.uses_decoder else tokens[:, :0]
        outputs = {"class_token": tokens[:, 0]}
        if config.class_level.weight:
            outputs["class_scores"] = self.class_head(tokens[:, 0])
        if config.data_level.weight:
            outputs["data_scores"] = self.data_head(_at(config.data_positions, tokens[:, 1:], decoded))
        if config.reconstruction.weight:
            outputs["reconstruction"] = self.reconstruction_head(decoded)
        return outputs


class Plmae:
    """The method: targets of the teachers, losses of the student."""

    inherits: tuple[str, ...] = ()

    def __init__(self, encoder: Encoder, config: PlmaeConfig, *, num_steps: int, seed: int) -> None:
        self.student = PlmaeStudent(encoder, config)
        self.teachers = _teachers(self.student, config, num_steps=num_steps)
        self.state = _state(config, encoder, seed=seed)
        self._config = config
        self._num_steps = num_steps

    def targets(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Returns the pseudo labels and the reconstruction targets, in the shapes of the student's outputs.

        Class labels are those that each view is compared with: under ``class_pairs: cross`` the mean over the other
        views, since a cross-entropy is linear in its labels.
        """
        images, visible, masked = (
            group["global"].flatten(0, 1) for group in (batch.views, batch.visible, batch.masked)
        )
        config, num_views = self._config, len(batch.views["global"])
        temperature = teacher_temperature(config.temperature, step / self._num_steps)
        targets: dict[str, Tensor] = {}

        tokens = images[:0]
        if "labelling_teacher" in self.teachers or "teacher" in self.teachers:
            labeller = self.teachers["teacher" if config.teachers == "one" else "labelling_teacher"].module
            tokens = labeller.get_submodule("encoder")(images)
            if config.class_level.weight:
                scores = labeller.get_submodule("class_head")(tokens[:, 0])
                labels = self._labels("class_level", scores, temperature)
                targets["class_scores"] = scores
                targets["class_labels"] = other_views(labels, num_views) if config.class_pairs == "cross" else labels
            if config.data_level.weight:
                seen, hidden = take(tokens[:, 1:], visible), take(tokens[:, 1:], masked)
                scores = labeller.get_submodule("data_head")(_at(config.data_positions, seen, hidden))
                targets["data_scores"] = scores
                labels = self._labels("data_level", scores.flatten(0, 1), temperature)
                targets["data_labels"] = labels.view(scores.shape)

        if config.reconstruction.weight:
            if config.teachers == "one":
                hidden = take(tokens[:, 1:], masked)
            else:
                teacher = self.teachers["reconstruction_teacher"].module.get_submodule("encoder")
                sees_masked = config.reconstruction.sees == "masked"
                hidden = teacher(images, masked)[:, 1:] if sees_masked else take(teacher(images)[:, 1:], masked)
            targets["reconstruction"] = self._reconstruction_targets(hidden, batch.masked["global"], temperature, step)
        return targets

    def loss(
        self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the weighted sum of the three cross-entropies (and ME-MAX terms), and each of them."""
        config, student = self._config, self._config.temperature.student
        total = outputs["class_token"].new_zeros((), dtype=torch.float32)
        metrics: dict[str, Tensor] = {}
        for name, level in (("class", config.class_level), ("data", config.data_level)):
            if not level.weight:
                continue
            loss, parts = level_loss(
                name,
                level,
                labels=targets[f"{name}_labels"],
                scores=outputs[f"{name}_scores"],
                temperature=student,
            )
            total = total + loss
            metrics |= parts
        if config.reconstruction.weight:
            loss = self._reconstruction_loss(outputs["reconstruction"], targets["reconstruction"])
            total = total + config.reconstruction.weight * loss
            metrics["loss_reconstruction"] = loss.detach()
        return total, metrics

    def monitors(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what tells of collapse: each level's monitors, before Sinkhorn, and RankMe of the class token."""
        figures = {"rank_me": rank_me(outputs["class_token"])}
        for name in ("class", "data"):
            if f"{name}_scores" not in outputs:
                continue
            figures |= level_monitors(
                name,
                student=outputs[f"{name}_scores"],
                teacher=targets[f"{name}_scores"],
                temperature=self._config.temperature.student,
            )
        return figures

    def _labels(self, level: str, scores: Tensor, temperature: float) -> Tensor:
        assigner = self.state.get_submodule(level)
        assert isinstance(assigner, Assigner)
        return assigner.labels(scores, temperature=temperature)

    def _reconstruction_targets(self, hidden: Tensor, masked: Tensor, temperature: float, step: int) -> Tensor:
        """Returns codes (int64 ``view·batch masked``), soft labels (``… code``) or features (``… dim``)."""
        target = self._config.reconstruction.target
        if target == "features":
            return F.layer_norm(hidden.float(), hidden.shape[-1:])
        if target == "head":
            role = "teacher" if self._config.teachers == "one" else "reconstruction_teacher"
            scores = self.teachers[role].module.get_submodule("reconstruction_head")(hidden)
            return self._labels("reconstruction", scores.flatten(0, 1), temperature).view(scores.shape)
        codebook = self.state.get_submodule("codebook")
        assert isinstance(codebook, Codebook)
        by_view = hidden.view(*masked.shape, hidden.shape[-1])
        return codebook.assign(by_view, masked, step=step).flatten(0, 1)

    def _reconstruction_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        target = self._config.reconstruction.target
        if target == "features":
            return F.smooth_l1_loss(outputs.float(), targets)
        if target == "head":
            return cross_entropy(targets, outputs, temperature=self._config.temperature.student).mean()
        return F.cross_entropy(outputs.flatten(0, 1).float(), targets.flatten())


def _at(positions: str, visible: Tensor, masked: Tensor) -> Tensor:
    if positions == "both":
        return torch.cat([visible, masked], dim=1)
    return visible if positions == "visible" else masked


def _reconstruction_head(config: PlmaeConfig, dim: int) -> nn.Module:
    settings = config.reconstruction
    if settings.target == "features":
        return nn.Linear(dim, dim)
    if settings.target == "head":
        return Head(settings.head, input_dim=dim)
    return nn.Linear(dim, settings.codes)


def _teachers(student: PlmaeStudent, config: PlmaeConfig, *, num_steps: int) -> dict[str, Teacher]:
    heads = [name for name in ("class_head", "data_head") if hasattr(student, name)]
    rebuilds = ["reconstruction_head"] * (config.reconstruction.weight > 0 and config.reconstruction.target == "head")
    parts: dict[str, tuple[list[str], MomentumConfig]] = {}
    if config.teachers == "one":
        parts["teacher"] = ["encoder", *heads, *rebuilds], config.labelling_momentum
    else:
        if heads:
            parts["labelling_teacher"] = ["encoder", *heads], config.labelling_momentum
        if config.reconstruction.weight:
            parts["reconstruction_teacher"] = ["encoder", *rebuilds], config.reconstruction_momentum
    teachers = {}
    for role, (names, momentum) in parts.items():
        module = nn.ModuleDict({name: copy.deepcopy(student.get_submodule(name)) for name in names})
        teachers[role] = Teacher(
            module=module.requires_grad_(False).eval(),
            follows=tuple(f"{name}." for name in names),
            momentum=cosine_momentum(momentum, num_steps),
        )
    return teachers


def _state(config: PlmaeConfig, encoder: Encoder, *, seed: int) -> nn.Module:
    state = nn.Module()
    for name, level in (("class_level", config.class_level), ("data_level", config.data_level)):
        if level.weight:
            state.add_module(name, new_assigner(level))
    settings = config.reconstruction
    if settings.weight and settings.target == "head":
        state.add_module("reconstruction", Assigner("sinkhorn", num_prototypes=settings.head.prototypes))
    elif settings.weight and settings.target != "features":
        codebook = Codebook(
            size=settings.codes,
            dim=encoder.embed_dim,
            num_positions=encoder.num_tokens if settings.code_centre == "position" else 0,
            momentum=settings.code_momentum,
            temperature=settings.code_temperature,
            frozen=settings.target == "frozen_codebook",
            seed=seed,
        )
        state.add_module("codebook", codebook)
    return state
