"""Judging while training: student and every teacher by k-NN, at the end beside raw pixels and the untrained network."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from maestri.engine.config import RunConfig
from maestri.evals.features import Extractor, ImageSettings, encoder_extractor, extract_features, raw_pixels
from maestri.evals.knn import KnnSettings, evaluate_knn
from maestri.evals.protocol import KnnReport
from maestri.evals.sets import Splits, check_sets, read_features, read_labels
from maestri.evals.sources import RANDOM_INIT, RAW_PIXELS, encoders_of, untrained_encoder
from maestri.model.method import Method


def can_judge(config: RunConfig, *, final: bool) -> bool:
    """Returns whether the configuration names images to classify."""
    return config.data.holdout > 0 or (final and bool(config.data.test_shards))


def check_images(config: RunConfig) -> None:
    """Opens the images that evaluation will need, so that a run does not train for days and fail then.

    Raises:
        ValueError: a set is missing, has no labels, or is smaller than ``data.holdout`` or ``evaluation.k``; or
            training and test images have different numbers of classes.
    """
    if not can_judge(config, final=True):
        return
    num_bank = check_sets(Path(config.data.shards), _test_shards(config), config.data.holdout)
    if num_bank < max(config.evaluation.k):
        raise ValueError(
            f"evaluation.k asks for {max(config.evaluation.k)} neighbours, but {config.data.shards} has "
            f"{num_bank + config.data.holdout} images and data.holdout takes {config.data.holdout}"
        )


def live_encoders(method: Method, student: nn.Module) -> dict[str, nn.Module]:
    """Returns the encoders of a training run by model; a teacher without one is left out.

    Args:
        method: the method.
        student: as the engine holds it.
    """
    return encoders_of(method, student)


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
    splits = Splits(
        shards=Path(config.data.shards),
        holdout=config.data.holdout,
        test_shards=_test_shards(config),
        max_train=0 if final else config.evaluation.train_images,
        max_test=0 if final else config.evaluation.test_images,
    )
    images = ImageSettings(
        size=config.views.size,
        crop_fraction=config.evaluation.crop_fraction,
        batch_size=config.evaluation.batch_size,
        num_threads=config.data.num_threads,
        device=device,
        executor=config.data.executor,
    )
    settings = KnnSettings(k=config.evaluation.k, temperature=config.evaluation.temperature)
    with _eval_mode(encoders):
        labelled = read_labels(splits, with_test=final, device=device)
        sets = read_features(labelled, splits, partial(extract_features, extractors, settings=images))
    return evaluate_knn(sets, settings)


def _test_shards(config: RunConfig) -> Path | None:
    return Path(config.data.test_shards) if config.data.test_shards else None


@contextmanager
def _eval_mode(encoders: Mapping[str, nn.Module]) -> Iterator[None]:
    # Each module for itself: frozen blocks stay in eval mode while the others train.
    were_training = [module for encoder in encoders.values() for module in encoder.modules() if module.training]
    for encoder in encoders.values():
        encoder.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True
