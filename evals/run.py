"""Judging a run: student and every teacher, beside raw pixels and the untrained network."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from maestri.engine.checkpoint import latest, load_weights
from maestri.engine.config import RunConfig
from maestri.engine.errors import CheckpointError
from maestri.evals.features import Extractor, ImageSettings, encoder_extractor, raw_pixels
from maestri.evals.protocol import KnnReport, KnnSettings, KnnSplits, evaluate_knn
from maestri.model.build import build_method
from maestri.model.encoder import Encoder
from maestri.model.method import Method
from maestri.shards.shard_set import ShardSet

RAW_PIXELS = "raw_pixels"
RANDOM_INIT = "random_init"
STUDENT = "student"


def can_judge(config: RunConfig, *, final: bool) -> bool:
    """Returns whether the configuration names images to classify."""
    return config.data.holdout > 0 or (final and bool(config.data.test_shards))


def check_images(config: RunConfig) -> None:
    """Opens the images that evaluation will need, so that a run does not train for days and fail then.

    Raises:
        ValueError: a set is missing, has no labels, or is smaller than ``data.holdout`` or ``evaluation.k``.
    """
    if not can_judge(config, final=True):
        return
    with ShardSet.open(config.data.shards) as train:
        num_bank = len(train) - config.data.holdout
        if num_bank < max(config.evaluation.k):
            raise ValueError(
                f"evaluation.k asks for {max(config.evaluation.k)} neighbours, but {config.data.shards} has "
                f"{len(train)} images and data.holdout takes {config.data.holdout}"
            )
        _check_labels(train, config.data.shards)
    if config.data.test_shards:
        with ShardSet.open(config.data.test_shards) as test:
            _check_labels(test, config.data.test_shards)


def _check_labels(shard_set: ShardSet, name: str) -> None:
    if not shard_set.manifest.class_names:
        raise ValueError(f"k-NN needs labels, and {name} has none; set data.holdout to 0 and no data.test_shards")


def live_encoders(method: Method, student: nn.Module) -> dict[str, nn.Module]:
    """Returns the encoders of a training run by model.

    Args:
        method: the method.
        student: as the engine holds it.
    """
    encoders = {STUDENT: student.get_submodule("encoder")}
    for role, teacher in method.teachers.items():
        encoders[role] = teacher.module.get_submodule("encoder")
    return encoders


def judge(config: RunConfig, encoders: Mapping[str, nn.Module], device: torch.device, *, final: bool) -> KnnReport:
    """Returns k-NN accuracies of the encoders; every rank must call it.

    Args:
        config: the run's.
        encoders: by model, on ``device``; put in eval mode meanwhile.
        device: where features are computed.
        final: whether all neighbours are used, test images are classified, and the baselines stand beside.
    """
    extractors: dict[str, Extractor] = {name: encoder_extractor(encoder) for name, encoder in encoders.items()}
    if final and config.evaluation.baselines:
        extractors[RAW_PIXELS] = raw_pixels
        extractors[RANDOM_INIT] = encoder_extractor(untrained_encoder(config).to(device).eval())
    splits = KnnSplits(
        shards=Path(config.data.shards),
        holdout=config.data.holdout,
        test_shards=Path(config.data.test_shards) if config.data.test_shards else None,
        max_train=0 if final else config.evaluation.train_images,
        max_test=0 if final else config.evaluation.test_images,
    )
    images = ImageSettings(
        size=config.views.size,
        crop_fraction=config.evaluation.crop_fraction,
        batch_size=config.evaluation.batch_size,
        num_threads=config.data.num_threads,
        device=device,
    )
    settings = KnnSettings(k=config.evaluation.k, temperature=config.evaluation.temperature)
    with _eval_mode(encoders):
        return evaluate_knn(extractors, splits, images, settings, with_test=final)


def untrained_encoder(config: RunConfig) -> Encoder:
    """Returns the encoder with the weights that the run started from, float32, on the CPU."""
    encoder = _new_method(config).student.get_submodule("encoder")
    assert isinstance(encoder, Encoder)
    return encoder


def saved_encoders(config: RunConfig, checkpoint: Path) -> dict[str, nn.Module]:
    """Returns the encoders of a checkpoint by model, float32, on the CPU.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
    """
    method = _new_method(config)
    encoders: dict[str, nn.Module] = {}
    for role in (STUDENT, *method.teachers):
        module = method.student if role == STUDENT else method.teachers[role].module
        encoder = module.get_submodule("encoder")
        prefix = "encoder."
        weights = load_weights(checkpoint, role)
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        try:
            encoder.load_state_dict(own)
        except RuntimeError as error:
            raise CheckpointError(f"{checkpoint} is of another model: {role}: {' '.join(str(error).split())}") from None
        encoders[role] = encoder
    return encoders


def judge_run(config: RunConfig, run: Path, device: torch.device) -> tuple[KnnReport, Path]:
    """Returns the final k-NN report of a run's newest checkpoint, and that checkpoint.

    Raises:
        CheckpointError: there is none, or it does not fit.
    """
    checkpoint = latest(run)
    if checkpoint is None:
        raise CheckpointError(f"{run} holds no checkpoint; train it first")
    encoders = {name: encoder.to(device) for name, encoder in saved_encoders(config, checkpoint).items()}
    return judge(config, encoders, device, final=True), checkpoint


def _new_method(config: RunConfig) -> Method:
    return build_method(
        config.method, config.encoder, image_size=config.views.size, num_steps=config.steps, seed=config.seed
    )


@contextmanager
def _eval_mode(encoders: Mapping[str, nn.Module]) -> Iterator[None]:
    were_training = [encoder for encoder in encoders.values() if encoder.training]
    for encoder in encoders.values():
        encoder.eval()
    try:
        yield
    finally:
        for encoder in were_training:
            encoder.train()
