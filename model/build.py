"""Methods by name."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from maestri.model import dino, ibot, mae, maect, maskcluster, mocov3, msn, plmae, sdae
from maestri.model.dino import Dino, DinoConfig
from maestri.model.encoder import Encoder, EncoderConfig, build_encoder
from maestri.model.ibot import Ibot, IbotConfig
from maestri.model.mae import Mae, MaeConfig
from maestri.model.maect import Maect
from maestri.model.maect_config import MaectConfig
from maestri.model.maskcluster import Maskcluster, MaskclusterConfig
from maestri.model.method import Method, ViewFacts
from maestri.model.mocov3 import Mocov3, Mocov3Config
from maestri.model.msn import Msn, MsnConfig
from maestri.model.plmae import Plmae
from maestri.model.plmae_config import PlmaeConfig
from maestri.model.sdae import Sdae, SdaeConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """Which method is trained, and the settings of each."""

    name: Literal["plmae", "mae", "maect", "maskcluster", "dino", "ibot", "sdae", "mocov3", "msn"] = "plmae"
    """The method; only its own section below is used."""
    plmae: PlmaeConfig = field(default_factory=PlmaeConfig)
    """PL-MAE."""
    mae: MaeConfig = field(default_factory=MaeConfig)
    """MAE."""
    maect: MaectConfig = field(default_factory=MaectConfig)
    """MAE-CT."""
    maskcluster: MaskclusterConfig = field(default_factory=MaskclusterConfig)
    """MaskCluster."""
    sdae: SdaeConfig = field(default_factory=SdaeConfig)
    """SdAE."""
    dino: DinoConfig = field(default_factory=DinoConfig)
    """DINO."""
    ibot: IbotConfig = field(default_factory=IbotConfig)
    """iBOT."""
    mocov3: Mocov3Config = field(default_factory=Mocov3Config)
    """MoCo-v3."""
    msn: MsnConfig = field(default_factory=MsnConfig)
    """MSN."""


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
    "sdae": _Entry(
        sdae.check_views, lambda config, encoder, steps, seed: Sdae(encoder, config, num_steps=steps, seed=seed)
    ),
    "dino": _Entry(dino.check_views, lambda config, encoder, steps, seed: Dino(encoder, config, num_steps=steps)),
    "ibot": _Entry(ibot.check_views, lambda config, encoder, steps, seed: Ibot(encoder, config, num_steps=steps)),
    "mocov3": _Entry(mocov3.check_views, lambda config, encoder, steps, seed: Mocov3(encoder, config, num_steps=steps)),
    "msn": _Entry(msn.check_views, lambda config, encoder, steps, seed: Msn(encoder, config, num_steps=steps)),
}
