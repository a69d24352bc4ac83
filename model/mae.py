"""MAE: masked autoencoders (He et al., arXiv 2111.06377)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from maestri.model.assignment import rank_me
from maestri.model.decoder import Decoder, DecoderConfig
from maestri.model.encoder import Encoder, normalise, take, to_patches
from maestri.model.method import Teacher, ViewFacts
from maestri.pipelines.batch import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class MaeConfig:
    """MAE; the defaults are the paper's for ViT-B."""

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The pixel decoder."""
    normalise_pixels: bool = True
    """Whether each patch's target has mean 0 and variance 1 (the paper's better variant)."""


def check_views(config: MaeConfig, facts: ViewFacts) -> None:
    """Raises ValueError where the views lack what MAE needs, or carry what it would ignore."""
    facts.refuse_local("mae")
    facts.refuse_corruption("mae")
    facts.need_hidden("mae", at_least=1)


class MaeStudent(nn.Module):
    """Encoder of visible tokens and a decoder that predicts the pixels of hidden patches."""

    def __init__(self, encoder: Encoder, config: MaeConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = Decoder(
            config.decoder,
            input_dim=encoder.embed_dim,
            output_dim=3 * encoder.patch**2,
            num_tokens=encoder.num_tokens,
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Returns ``pixels``: ``view·batch masked 3·patch·patch``, and ``class_token`` for monitoring."""
        images, visible, masked = (
            group["global"].flatten(0, 1) for group in (batch.views, batch.visible, batch.masked)
        )
        tokens = self.encoder(images, visible)
        return {"pixels": self.decoder(tokens, visible, masked), "class_token": tokens[:, 0]}


class Mae:
    """Masked pixels from visible tokens; no teacher."""

    inherits: tuple[str, ...] = ()

    def __init__(self, encoder: Encoder, config: MaeConfig) -> None:
        self.student = MaeStudent(encoder, config)
        self.teachers: Mapping[str, Teacher] = {}
        self.state = nn.Module()
        self._config = config
        self._patch = encoder.patch

    def targets(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Returns ``pixels``: float32 ``view·batch masked 3·patch·patch`` of the hidden patches."""
        images, masked = (group["global"].flatten(0, 1) for group in (batch.views, batch.masked))
        pixels = normalise(take(to_patches(images, self._patch), masked), dim=2).flatten(2)
        if self._config.normalise_pixels:
            variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
            pixels = (pixels - mean) / (variance + 1e-6).sqrt()
        return {"pixels": pixels}

    def loss(
        self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the mean squared error over hidden pixels."""
        loss = torch.nn.functional.mse_loss(outputs["pixels"].float(), targets["pixels"])
        return loss, {"loss_reconstruction": loss.detach()}

    def monitors(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns figures too dear for every step: RankMe of the class token."""
        return {"rank_me": rank_me(outputs["class_token"])}
