"""MAE-CT: contrastive tuning of a masked autoencoder (arXiv 2304.10520).

After MAE come two stages.  ``head`` trains an NNCLR head (arXiv 2104.14548) on the frozen encoder; ``tune`` goes on
with the head and the encoder's upper half.  Both look at all tokens of two views of an image.  A view's projection
finds a neighbour in a queue of earlier projections; from the neighbour, the other view's prediction has to be told
among the predictions for all images of all ranks.
"""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maestri.model.assignment import rank_me
from maestri.model.batch_norm import BatchNorm
from maestri.model.collectives import gather_over_ranks_with_gradient, rank, sum_over_ranks
from maestri.model.draws import batch_generator, own_samples, samples_over_ranks
from maestri.model.encoder import Encoder
from maestri.model.maect_config import MaectConfig
from maestri.model.method import Teacher, ViewFacts
from maestri.model.queue import NeighbourQueue
from maestri.pipelines.batch import Batch

NUM_VIEWS = 2


def check_views(config: MaectConfig, facts: ViewFacts) -> None:
    """Raises ValueError where the views or the batch lack what MAE-CT needs, or carry what it would ignore."""
    facts.refuse_local("maect")
    facts.refuse_corruption("maect")
    if facts.num_views != NUM_VIEWS:
        raise ValueError(f"views.count is {facts.num_views}; method maect compares {NUM_VIEWS} views")
    if facts.num_masked != 0:
        raise ValueError("views.mask.ratio hides tokens, but method maect looks at all of them; set it to 0")
    if facts.micro_size and config.queue_size % facts.micro_size:
        raise ValueError(
            f"method.maect.queue_size is {config.queue_size}; it must be a multiple of the images per micro-batch "
            f"({facts.micro_size}: batch.global_size / batch.accumulation)"
        )


class MaectStudent(nn.Module):
    """Encoder, projector and predictor; what is frozen has no gradient and stays in eval mode."""

    def __init__(self, encoder: Encoder, config: MaectConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = _projector(encoder.embed_dim, config)
        self.predictor = _predictor(config)
        self._pooling = config.pooling
        self._tunes = config.stage == "tune"
        self._frozen = _frozen_parts(encoder, config)
        for part in self._frozen:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> "MaectStudent":
        """Sets the mode of what is trained."""
        super().train(mode)
        for part in self._frozen:
            if isinstance(part, nn.Module):
                part.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Returns ``pooled``, ``projected`` and ``predicted``, each ``view batch dim``."""
        images = batch.views["global"]
        # While tuning, too, nothing is kept for a backward pass below the first trained block: pixels and frozen
        # weights need no gradient.
        with torch.set_grad_enabled(self._tunes and torch.is_grad_enabled()):
            tokens = self.encoder(images.flatten(0, 1))
            pooled = tokens[:, 0] if self._pooling == "cls" else tokens[:, 1:].mean(dim=1)
        pooled = pooled.unflatten(0, images.shape[:2])
        projected = self.projector(pooled)
        return {"pooled": pooled, "projected": projected, "predicted": self.predictor(projected)}


class Maect:
    """The method: neighbours of each view's projections are what the other view's predictions are compared with."""

    def __init__(self, encoder: Encoder, config: MaectConfig, *, seed: int) -> None:
        tunes = config.stage == "tune"
        self.inherits: tuple[str, ...] = ("encoder.", "projector.", "predictor.", "queue.") if tunes else ("encoder.",)
        self.student = MaectStudent(encoder, config)
        self.teachers = _teachers(self.student, config) if tunes else {}
        self.queue = NeighbourQueue(size=config.queue_size, dim=config.projection, seed=seed)
        self.state = nn.ModuleDict({"queue": self.queue})
        self._config = config
        self._seed = seed

    def targets(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Returns what the look-up needs, int64: ``rows`` and ``labels`` (``batch``), and ``draws`` (``view batch``).

        The look-up itself belongs to the loss, for it starts from the student's tokens.  ``draws`` says which of the
        ``top_k`` nearest entries is taken.
        """
        shape = (NUM_VIEWS, samples_over_ranks(batch))
        draws = torch.randint(self._config.top_k, shape, generator=batch_generator(batch, self._seed))
        return {"rows": batch.rows, "labels": batch.labels, "draws": own_samples(draws, batch).to(batch.rows.device)}

    def loss(
        self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns NNCLR's cross-entropy, averaged over both directions, and stages view 0's projections.

        The neighbour is the query; the softmax runs over the other view's predictions on all ranks, and gradients reach
        them all.  Every rank must call it.
        """
        projections = self._projections(outputs)
        index = self.queue.nearest(projections, targets["rows"], targets["draws"], top_k=self._config.top_k)
        neighbours = self.queue.entries[index]
        self.queue.enqueue(projections[0], targets["rows"], targets["labels"])

        # Gathered along the batch; from here on with the view in front again.
        predictions = F.normalize(outputs["predicted"].float(), dim=-1)
        predictions = gather_over_ranks_with_gradient(predictions.transpose(0, 1)).transpose(0, 1)
        logits = neighbours.flip(0) @ predictions.transpose(1, 2) / self._config.temperature
        size = len(targets["rows"])
        own = rank() * size + torch.arange(size, device=logits.device)
        loss = F.cross_entropy(logits.flatten(0, 1), own.repeat(NUM_VIEWS))
        similarity = (projections * neighbours).sum(dim=-1).mean()
        return loss, {"loss_contrastive": loss.detach(), "neighbour_similarity": similarity}

    def monitors(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns RankMe of the pooled tokens, and how often the nearest neighbour is of the image's class.

        The latter only where both labels are known for some images, over all ranks: each must call it.
        """
        figures = {"rank_me": rank_me(outputs["pooled"].flatten(0, 1))}
        projections = self._projections(outputs)
        index = self.queue.nearest(projections, targets["rows"], torch.zeros_like(targets["draws"]), top_k=1)
        labels, found = targets["labels"], self.queue.labels[index]
        known = (labels >= 0) & (found >= 0)
        agreeing, count = sum_over_ranks(torch.stack([(known & (labels == found)).sum(), known.sum()]))
        if count:
            figures["neighbour_agreement"] = agreeing / count
        return figures

    @torch.no_grad()
    def _projections(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Returns unit vectors, float32 ``view batch dim``: the student's, or its teacher's of the student's tokens."""
        if self._config.stage == "tune":
            projected = self.teachers["projection_teacher"].module.get_submodule("projector")(outputs["pooled"])
        else:
            projected = outputs["projected"]
        return F.normalize(projected.float(), dim=-1)


def _projector(input_dim: int, config: MaectConfig) -> nn.Sequential:
    hidden, output = config.projector_hidden, config.projection
    return nn.Sequential(
        *(nn.Linear(input_dim, hidden, bias=False), BatchNorm(hidden), nn.ReLU()),
        *(nn.Linear(hidden, hidden, bias=False), BatchNorm(hidden), nn.ReLU()),
        *(nn.Linear(hidden, output, bias=False), BatchNorm(output)),
    )


def _predictor(config: MaectConfig) -> nn.Sequential:
    hidden, output = config.predictor_hidden, config.projection
    return nn.Sequential(
        *(nn.Linear(output, hidden, bias=False), BatchNorm(hidden), nn.ReLU()),
        nn.Linear(hidden, output, bias=False),
    )


def _frozen_parts(encoder: Encoder, config: MaectConfig) -> tuple[nn.Module | nn.Parameter, ...]:
    """Returns what keeps its weights; a tuple, so that the student does not hold modules twice."""
    if config.stage == "head":
        return (encoder,)
    depth = len(encoder.blocks)
    count = depth // 2 if config.frozen_blocks is None else config.frozen_blocks
    if count > depth:
        raise ValueError(f"method.maect.frozen_blocks is {count}; the encoder has only {depth} blocks")
    if not count:
        return ()
    assert encoder.cls_token is not None and encoder.pos_embed is not None
    return (encoder.patch_embed, encoder.cls_token, encoder.pos_embed, *list(encoder.blocks)[:count])


def _teachers(student: MaectStudent, config: MaectConfig) -> dict[str, Teacher]:
    """Returns the average of the projector, by batch statistics as the student's, and that of the encoder."""

    def copied(name: str) -> nn.Module:
        return nn.ModuleDict({name: copy.deepcopy(student.get_submodule(name))}).requires_grad_(False)

    return {
        "projection_teacher": Teacher(
            module=copied("projector"),
            follows=("projector.",),
            momentum=lambda step: config.projector_momentum,
            train_mode=True,
        ),
        "encoder_average": Teacher(
            module=copied("encoder").eval(),
            follows=("encoder.",),
            momentum=lambda step: config.encoder_momentum,
        ),
    }
