"""MoCo-v3: contrast of two views with an averaged encoder (Chen, Xie and He, arXiv 2104.02057).

From each view's query, made by encoder, projector and predictor, the other view's key has to be told among the keys of
all images of all ranks.  Keys come from an average of encoder and projector.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestri.model.assignment import rank_me
from maestri.model.batch_norm import BatchNorm
from maestri.model.collectives import gather_over_ranks, rank
from maestri.model.encoder import Encoder
from maestri.model.levels import MomentumConfig, cosine_momentum
from maestri.model.method import Teacher, ViewFacts
from maestri.pipelines.batch import Batch

NUM_VIEWS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Mocov3Config:
    """MoCo-v3 (arXiv 2104.02057); the defaults are the authors' for vision transformers."""

    hidden: int = 4096
    """Width of the hidden layers of projector and predictor."""
    projection: int = 256
    """Width of projections, queries and keys."""
    temperature: float = 0.2
    """τ of the softmax over all keys; the loss is multiplied by 2 τ."""
    freeze_patch_embedding: bool = True
    """Whether the encoder's patch embedding keeps its random weights, which makes training stable."""
    momentum: MomentumConfig = field(default_factory=lambda: MomentumConfig(start=0.99))
    """EMA of encoder and projector."""

    def __post_init__(self) -> None:
        for name in ("hidden", "projection"):
            if getattr(self, name) < 1:
                raise ValueError(f"mocov3.{name} is {getattr(self, name)}; it must be at least 1")
        if self.temperature <= 0:
            raise ValueError(f"mocov3.temperature is {self.temperature}; it must be above 0")


def check_views(config: Mocov3Config, facts: ViewFacts) -> None:
    """Raises ValueError where the views lack what MoCo-v3 needs, or carry what it would ignore."""
    facts.refuse_local("mocov3")
    facts.refuse_corruption("mocov3")
    if facts.num_views != NUM_VIEWS:
        raise ValueError(f"views.count is {facts.num_views}; method mocov3 compares {NUM_VIEWS} views")
    if facts.num_masked != 0:
        raise ValueError("views.mask.ratio hides tokens, but method mocov3 looks at all of them; set it to 0")


class Mocov3Student(nn.Module):
    """Encoder, projector and predictor."""

    def __init__(self, encoder: Encoder, config: Mocov3Config) -> None:
        super().__init__()
        self.encoder = encoder
        hidden, output = config.hidden, config.projection
        self.projector = nn.Sequential(
            *(nn.Linear(encoder.embed_dim, hidden, bias=False), BatchNorm(hidden), nn.ReLU()),
            *(nn.Linear(hidden, hidden, bias=False), BatchNorm(hidden), nn.ReLU()),
            *(nn.Linear(hidden, output, bias=False), BatchNorm(output, affine=False)),
        )
        self.predictor = nn.Sequential(
            *(nn.Linear(output, hidden, bias=False), BatchNorm(hidden), nn.ReLU()),
            *(nn.Linear(hidden, output, bias=False), BatchNorm(output, affine=False)),
        )
        if config.freeze_patch_embedding:
            encoder.patch_embed.requires_grad_(False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Returns ``class_token`` and ``predicted``, each ``view batch dim``."""
        images = batch.views["global"]
        class_token = self.encoder(images.flatten(0, 1))[:, 0].unflatten(0, images.shape[:2])
        return {"class_token": class_token, "predicted": self.predictor(self.projector(class_token))}


class Mocov3:
    """The method: queries of the student, keys of its average."""

    inherits: tuple[str, ...] = ()

    def __init__(self, encoder: Encoder, config: Mocov3Config, *, num_steps: int) -> None:
        self.student = Mocov3Student(encoder, config)
        names = ("encoder", "projector")
        module = nn.ModuleDict({name: copy.deepcopy(self.student.get_submodule(name)) for name in names})
        # In eval mode only drop-path is off: its batch norm, too, goes by the micro-batch.
        self.teachers = {
            "key_teacher": Teacher(
                module=module.requires_grad_(False).eval(),
                follows=tuple(f"{name}." for name in names),
                momentum=cosine_momentum(config.momentum, num_steps),
            )
        }
        self.state = nn.Module()
        self._config = config

    def targets(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Returns ``keys``: unit vectors of the images of all ranks, float32 ``view images dim``."""
        images = batch.views["global"]
        teacher = self.teachers["key_teacher"].module
        tokens = teacher.get_submodule("encoder")(images.flatten(0, 1))[:, 0].unflatten(0, images.shape[:2])
        keys = F.normalize(teacher.get_submodule("projector")(tokens).float(), dim=-1)
        # Gathered along the batch; then with the view in front again.
        return {"keys": gather_over_ranks(keys.transpose(0, 1)).transpose(0, 1)}

    def loss(
        self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns 2 τ times the sum of both directions' InfoNCE: each view's queries against the other's keys."""
        queries = F.normalize(outputs["predicted"].float(), dim=-1)
        size = queries.shape[1]
        similarities = queries @ targets["keys"].flip(0).transpose(1, 2)
        logits = (similarities / self._config.temperature).flatten(0, 1)
        own = (rank() * size + torch.arange(size, device=logits.device)).repeat(NUM_VIEWS)
        loss = 2 * self._config.temperature * NUM_VIEWS * F.cross_entropy(logits, own)
        found = (logits.detach().argmax(dim=-1) == own).float().mean()
        return loss, {"loss_contrastive": loss.detach(), "keys_found": found}

    def monitors(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns figures too dear for every step: RankMe of the class token."""
        return {"rank_me": rank_me(outputs["class_token"].flatten(0, 1))}
