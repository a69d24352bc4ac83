"""Methods by name."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from maestri.model.encoder import EncoderConfig, build_encoder
from maestri.model.mae import Mae, MaeConfig
from maestri.model.method import Method
from maestri.model.plmae import Plmae
from maestri.model.plmae_config import PlmaeConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """Which method is trained, and the settings of each."""

    name: Literal["plmae", "mae"] = "plmae"
    """The method; only its own section below is used."""
    plmae: PlmaeConfig = field(default_factory=PlmaeConfig)
    """PL-MAE."""
    mae: MaeConfig = field(default_factory=MaeConfig)
    """MAE."""


def check_views(
    config: MethodConfig, *, num_views: int, num_local: int = 0, num_masked: int | None, corrupted: bool = False
) -> None:
    """Checks that the views carry what the method needs, and nothing that it would ignore.

    Args:
        config: the method.
        num_views: global views of a sample.
        num_local: local views of a sample.
        num_masked: tokens that a view hides; None where views hide different numbers.
        corrupted: whether views have corrupted twins.

    Raises:
        ValueError: cross-view labels with one view, nothing or varying numbers hidden where hidden tokens are
            predicted, or views that the method has no use for.
    """
    plmae = config.name == "plmae"
    if plmae and config.plmae.class_level.weight and config.plmae.class_pairs == "cross" and num_views < 2:
        raise ValueError(
            f"views.count is {num_views}; method.plmae.class_pairs: cross needs at least 2 (or set class_pairs: same)"
        )
    if num_local:
        raise ValueError(f"views.local.count is {num_local}; method {config.name} has no use for local views")
    if corrupted:
        raise ValueError(f"views.corruption.coverage is above 0; method {config.name} hides tokens, see views.mask")
    if num_masked is None:
        raise ValueError(
            f"views.mask.spread and views.mask.unmasked must be 0: method {config.name} encodes visible tokens alone, "
            "equally many in each view"
        )
    if num_masked < 1 and (not plmae or config.plmae.uses_decoder):
        raise ValueError("views.mask.ratio hides no token, but the method predicts hidden tokens; raise it")


def build_method(config: MethodConfig, encoder: EncoderConfig, *, image_size: int, num_steps: int, seed: int) -> Method:
    """Returns a new method with weights drawn from ``seed``; ``num_steps`` is the length of its schedules."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_encoder(encoder, image_size=image_size)
        if config.name == "mae":
            return Mae(backbone, config.mae)
        return Plmae(backbone, config.plmae, num_steps=num_steps, seed=seed)
