"""SdAE: a masked autoencoder whose targets are its own features (Chen et al., arXiv 2208.00449).

As in MAE, the student encodes visible tokens and a decoder predicts at hidden ones: not pixels, but what a teacher, an
average of the encoder, makes of the hidden patches themselves.  Those are dealt at random to a few folds, and the
teacher encodes each fold alone, so that it, too, sees only part of the image, and costs less.
"""

import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestri.model.assignment import rank_me
from maestri.model.decoder import Decoder, DecoderConfig
from maestri.model.draws import batch_generator, own_samples, samples_over_ranks
from maestri.model.encoder import Encoder, take
from maestri.model.levels import MomentumConfig, cosine_momentum
from maestri.model.method import Teacher, ViewFacts
from maestri.pipelines.batch import Batch

_LOGGER = logging.getLogger(__name__)
_AXIS = {"channel": -1, "token": -2}


@dataclass(frozen=True, kw_only=True, slots=True)
class SdaeConfig:
    """SdAE; the defaults are the authors' for ViT-B on ImageNet.  docs/methods.md says what is ours."""

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The decoder of features; its output is as wide as the encoder."""
    folds: int = 3
    """Groups of hidden tokens that the teacher encodes one by one, all of one size; tokens that are left over have no
    target."""
    cosine_axis: Literal["channel", "token"] = "channel"
    """``channel`` compares the features of a token (paper), ``token`` the values of a feature over a fold's tokens
    (released code)."""
    momentum: MomentumConfig = field(default_factory=lambda: MomentumConfig(start=0.96, end=0.99))
    """EMA of the teacher, at each of its updates."""
    update_every: int = 1668
    """Optimizer steps between updates of the teacher; the default is an epoch of ImageNet in batches of 768."""

    def __post_init__(self) -> None:
        for name in ("folds", "update_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"sdae.{name} is {getattr(self, name)}; it must be at least 1")


def check_views(config: SdaeConfig, facts: ViewFacts) -> None:
    """Raises ValueError where the views lack what SdAE needs, or carry what it would ignore."""
    facts.refuse_local("sdae")
    facts.refuse_corruption("sdae")
    facts.need_hidden("sdae", at_least=1)
    if facts.num_masked is not None and facts.num_masked < config.folds:
        raise ValueError(
            f"views.mask.ratio hides {facts.num_masked} tokens, but method.sdae.folds is {config.folds}: each fold "
            "needs one; raise the ratio or take fewer folds"
        )


class SdaeStudent(nn.Module):
    """Encoder of visible tokens and a decoder that predicts the features of hidden patches."""

    def __init__(self, encoder: Encoder, config: SdaeConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = Decoder(
            config.decoder, input_dim=encoder.embed_dim, output_dim=encoder.embed_dim, num_tokens=encoder.num_tokens
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Returns ``features``: ``view·batch masked dim``, and ``class_token`` (``view·batch dim``) for monitoring."""
        images, visible, masked = (
            group["global"].flatten(0, 1) for group in (batch.views, batch.visible, batch.masked)
        )
        tokens = self.encoder(images, visible)
        return {"features": self.decoder(tokens, visible, masked), "class_token": tokens[:, 0]}


class Sdae:
    """Features of hidden patches from visible ones, compared by their cosine."""

    inherits: tuple[str, ...] = ()

    def __init__(self, encoder: Encoder, config: SdaeConfig, *, num_steps: int, seed: int) -> None:
        if config.update_every > num_steps:
            _LOGGER.warning(
                "method.sdae.update_every is %d, but the run has %d steps: the teacher stays as it was drawn",
                config.update_every,
                num_steps,
            )
        self.student = SdaeStudent(encoder, config)
        # Eval mode: the student's drop-path is no part of the targets.
        teacher = Teacher(
            module=nn.ModuleDict({"encoder": deepcopy(encoder)}).requires_grad_(False).eval(),
            follows=("encoder.",),
            momentum=cosine_momentum(config.momentum, num_steps),
            every=config.update_every,
        )
        self.teachers: Mapping[str, Teacher] = {"teacher": teacher}
        self.state = nn.Module()
        self._config = config
        self._seed = seed

    def targets(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Returns the teacher's features of hidden patches, fold by fold, and whose they are.

        ``features``: float32 ``view·batch fold token dim``, each token with mean 0 and variance 1; ``places``: int64
        ``view·batch fold·token``, where each of them stands among the hidden tokens.
        """
        images, masked = (group["global"].flatten(0, 1) for group in (batch.views, batch.masked))
        folds = self._config.folds
        places = self._places(batch)
        tokens = take(masked, places).view(len(images) * folds, -1)
        teacher = self.teachers["teacher"].module.get_submodule("encoder")
        features = teacher(images.repeat_interleave(folds, dim=0), tokens)[:, 1:].float()
        features = F.layer_norm(features, features.shape[-1:], eps=1e-6)
        return {"features": features.unflatten(0, (-1, folds)), "places": places}

    def loss(
        self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns 1 − the mean cosine of predicted and target features."""
        features = targets["features"]
        predicted = take(outputs["features"], targets["places"]).float().view(features.shape)
        loss = 1 - F.cosine_similarity(predicted, features, dim=_AXIS[self._config.cosine_axis]).mean()
        return loss, {"loss_reconstruction": loss.detach()}

    def monitors(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns figures too dear for every step: RankMe of the class token, and of the mean target of each view."""
        return {
            "rank_me": rank_me(outputs["class_token"]),
            "rank_me_teacher": rank_me(targets["features"].flatten(1, 2).mean(dim=1)),
        }

    def _places(self, batch: Batch) -> Tensor:
        """Returns which hidden tokens are dealt to the first fold, the second, …, int64 ``view·batch fold·token``."""
        masked = batch.masked["global"]
        num_views, _, num_masked = masked.shape
        shape = (num_views, samples_over_ranks(batch), num_masked)
        keys = torch.rand(shape, generator=batch_generator(batch, self._seed))
        places = own_samples(keys, batch).flatten(0, 1).argsort(dim=-1)
        places = places[:, : num_masked - num_masked % self._config.folds]
        if masked.is_cuda:  # from pinned memory the copy does not wait for what the GPU has still to do
            return places.pin_memory().to(masked.device, non_blocking=True)
        return places.to(masked.device)
