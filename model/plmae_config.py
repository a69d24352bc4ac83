"""The switches of PL-MAE."""

from dataclasses import dataclass, field
from typing import Literal

from maestri.model.decoder import DecoderConfig
from maestri.model.heads import HeadConfig
from maestri.model.levels import LevelConfig, MomentumConfig, TemperatureConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructionConfig:
    """Token reconstruction at hidden positions."""

    weight: float = 1.0
    """Weight in the loss; 0 leaves decoder and reconstruction out."""
    target: Literal["codebook", "frozen_codebook", "head", "features"] = "codebook"
    """Codes of online k-means; codes fixed at the start; soft labels from an EMA of the student's head (iBOT); or the
    teacher's layer-normalised features under a smooth L1 loss."""
    sees: Literal["all", "masked"] = "all"
    """Whether the reconstruction teacher encodes the whole view, or its hidden patches only (SdAE), which costs
    less; ignored with one teacher."""
    codes: int = 8192
    """Rows of the codebook."""
    code_momentum: float = 0.99
    """EMA of the codes, per micro-step."""
    code_temperature: float = 0.05
    """Of the balanced assignment of tokens to codes."""
    code_centre: Literal["none", "position"] = "none"
    """``position`` takes off each position's mean over the micro-batch first, so that codes tell what is there and not
    where it is."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """Head under ``target: head``."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"reconstruction.weight is {self.weight}; a weight of the loss must be at least 0")
        if self.codes < 2:
            raise ValueError(f"reconstruction.codes is {self.codes}; at least 2 are needed")
        if not 0.0 <= self.code_momentum < 1.0:
            raise ValueError(f"reconstruction.code_momentum is {self.code_momentum}; it must lie in [0, 1)")
        if self.code_temperature <= 0:
            raise ValueError(f"reconstruction.code_temperature is {self.code_temperature}; it must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlmaeConfig:
    """PL-MAE (arXiv 2406.17450).  docs/methods.md says which defaults are the paper's and which are ours."""

    teachers: Literal["two", "one"] = "two"
    """One teacher labels and another makes reconstruction targets, or one does both (the ablation)."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """Decoder of hidden positions."""
    class_level: LevelConfig = field(default_factory=LevelConfig)
    """Pseudo labels of the class token."""
    class_pairs: Literal["cross", "same"] = "cross"
    """Labels come from the other views of the image, or from the same view."""
    data_level: LevelConfig = field(default_factory=LevelConfig)
    """Pseudo labels of data (patch) tokens, same view, same position."""
    data_positions: Literal["visible", "masked", "both"] = "visible"
    """Where data tokens are labelled: at the encoder's outputs, at the decoder's, or at both."""
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    """Token reconstruction."""
    temperature: TemperatureConfig = field(default_factory=TemperatureConfig)
    """Temperatures of both levels."""
    labelling_momentum: MomentumConfig = field(default_factory=MomentumConfig)
    """EMA of the labelling teacher: encoder and heads."""
    reconstruction_momentum: MomentumConfig = field(default_factory=lambda: MomentumConfig(start=0.9995))
    """EMA of the reconstruction teacher: encoder; unused with one teacher."""

    @property
    def uses_decoder(self) -> bool:
        """Whether anything is predicted at hidden positions."""
        return self.reconstruction.weight > 0 or (self.data_level.weight > 0 and self.data_positions != "visible")

    def __post_init__(self) -> None:
        if self.class_level.weight + self.data_level.weight + self.reconstruction.weight == 0:
            raise ValueError("plmae: class_level, data_level and reconstruction all have weight 0; nothing is learnt")
