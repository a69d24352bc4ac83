"""Methods by name."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from maestri.model import mae, maect, maskcluster, plmae
from maestri.model.encoder import Encoder, EncoderConfig, build_encoder
from maestri.model.mae import Mae, MaeConfig
from maestri.model.maect import Maect
from maestri.model.maect_config import MaectConfig
from maestri.model.maskcluster import Maskcluster, MaskclusterConfig
from maestri.model.method import Method, ViewFacts
from maestri.model.plmae import Plmae
from maestri.model.plmae_config import PlmaeConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """Which method is trained, and the settings of each."""

    name: Literal["plmae", "mae", "maect", "maskcluster"] = "plmae"
    """The method; only its own section below is used."""
    plmae: PlmaeConfig = field(default_factory=PlmaeConfig)
    """PL-MAE."""
    mae: MaeConfig = field(default_factory=MaeConfig)
    """MAE."""
    maect: MaectConfig = field(default_factory=MaectConfig)
    """MAE-CT."""
    maskcluster: MaskclusterConfig = field(default_factory=MaskclusterConfig)
    """MaskCluster."""


def check_views(config: MethodConfig, facts: ViewFacts) -> None:
    """Checks that the views carry what the method needs, and nothing that it would ignore.

    Raises:
        ValueError: names the field of ``views`` and the method.
    """
    _METHODS[config.name].check(getattr(config, config.name), facts)


def build_method(config: MethodConfig, encoder: EncoderConfig, *, image_size: int, num_steps: int, seed: int) -> Method:
    """Returns a new method with weights drawn from ``seed``; ``num_steps`` is the length of its schedules."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_encoder(encoder, image_size=image_size)
        return _METHODS[config.name].build(getattr(config, config.name), backbone, num_steps, seed)


@dataclass(frozen=True, slots=True)
class _Entry:
    """How a method checks its views and is built; both take the method's own section of the configuration."""

    check: Callable[[Any, ViewFacts], None]
    build: Callable[[Any, Encoder, int, int], Method]


_METHODS = {
    "plmae": _Entry(
        plmae.check_views, lambda config, encoder, steps, seed: Plmae(encoder, config, num_steps=steps, seed=seed)
    ),
    "mae": _Entry(mae.check_views, lambda config, encoder, steps, seed: Mae(encoder, config)),
    "maect": _Entry(maect.check_views, lambda config, encoder, steps, seed: Maect(encoder, config, seed=seed)),
    "maskcluster": _Entry(
        maskcluster.check_views, lambda config, encoder, steps, seed: Maskcluster(encoder, config, num_steps=steps)
    ),
}
