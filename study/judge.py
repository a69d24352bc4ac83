"""Judges one finished run, in a process of its own: ``python -m maestri.study.judge RUN FILE SETTINGS [untrained]``.

SETTINGS is a ``JudgingConfig`` as JSON.  FILE gets, for each protocol, the accuracy of the model, pooling and setting
that are best on held-out training images, whichever they are: the rule is the same for all methods.  ``untrained``
judges raw pixels and the network as the run's seed draws it instead.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from maestri.engine import distributed
from maestri.engine.checkpoint import latest
from maestri.engine.config import RunConfig
from maestri.engine.config_files import load_config
from maestri.engine.errors import CheckpointError
from maestri.evals.features import Extractor, ImageSettings, encoder_extractor, extract_features, raw_pixels
from maestri.evals.knn import KnnSettings, evaluate_knn
from maestri.evals.linear import LinearSettings, evaluate_linear
from maestri.evals.lowshot import evaluate_lowshot
from maestri.evals.protocol import AccuracyReport, FeatureSets, StrengthReport
from maestri.evals.sets import read_features, read_labels
from maestri.evals.sharing import FAILURES
from maestri.evals.sources import RANDOM_INIT, RAW_PIXELS, saved_encoders, untrained_encoder
from maestri.shards.files import write_atomically
from maestri.study.config import JudgingConfig
from maestri.study.entries import lowshot_settings, splits_of
from maestri.study.works import RECIPE, conditions


def judge(run: Path, settings: JudgingConfig, *, untrained: bool) -> dict[str, Any]:
    """Returns the accuracies of a finished run by protocol, or those of the baselines by model and protocol.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ValueError: the images are too few.
    """
    config = load_config(run / RECIPE)
    device = distributed.prepare_environment(config.engine.device)
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    extractors, step = _untrained(config, device) if untrained else _trained(config, run, device)
    images = ImageSettings(
        size=config.views.size,
        crop_fraction=config.evaluation.crop_fraction,
        batch_size=config.evaluation.batch_size,
        num_threads=config.data.num_threads,
        device=device,
        executor=config.data.executor,
    )

    models = tuple(extractors)
    splits = splits_of(config, max_train=settings.train_images)
    labelled = read_labels(splits, device=device)
    sets = read_features(labelled, splits, partial(extract_features, extractors, settings=images))
    knn = KnnSettings(k=(settings.k,), temperature=config.evaluation.temperature)
    reports = {"knn": evaluate_knn(sets, knn), **dict(_few_reports(sets, settings, Path(config.data.shards)))}
    about = {"settings": conditions(settings, config), "step": step, "split": "test" if sets.test else "held-out"}
    about["images"] = len(sets.test.labels) if sets.test else sets.num_held_out
    if untrained:
        return about | {"models": {model: _all_chosen(reports, (model,)) for model in models}}
    return about | {"models": list(models), "found": _all_chosen(reports, models)}


def _trained(config: RunConfig, run: Path, device: torch.device) -> tuple[dict[str, Extractor], int]:
    checkpoint = latest(run)
    if checkpoint is None:
        raise CheckpointError(f"{run} holds no checkpoint")
    encoders = saved_encoders(config, checkpoint)
    step = int(checkpoint.name.rpartition("_")[2])
    return {name: encoder_extractor(encoder.to(device).eval()) for name, encoder in encoders.items()}, step


def _untrained(config: RunConfig, device: torch.device) -> tuple[dict[str, Extractor], int]:
    return {RAW_PIXELS: raw_pixels, RANDOM_INIT: encoder_extractor(untrained_encoder(config).to(device).eval())}, 0


def _few_reports(sets: FeatureSets, settings: JudgingConfig, shards: Path) -> Iterator[tuple[str, AccuracyReport]]:
    if settings.shots:
        yield from evaluate_lowshot(sets, lowshot_settings(settings), shards=shards, seed=0).items()
    if settings.linear_epochs:
        yield "linear", evaluate_linear(sets, LinearSettings(epochs=settings.linear_epochs), seed=0)


def _all_chosen(reports: Mapping[str, AccuracyReport], models: tuple[str, ...]) -> dict[str, Any]:
    return {name: _chosen(report, models) for name, report in reports.items()}


def _chosen(report: AccuracyReport, models: tuple[str, ...]) -> dict[str, Any]:
    """Returns what held-out images choose, and its accuracy there and on test images (or held-out ones again)."""
    model = report.best(models)
    pooling, setting = report.choice(model)
    found = {
        "model": model,
        "pooling": pooling,
        report.setting: setting,
        "held_out": report.holdout[model][pooling][setting],
        "top1": report.chosen(model),
    }
    if isinstance(report, StrengthReport):
        deviations = report.test_deviation or report.holdout_deviation
        found["deviation_over_splits"] = deviations[model][pooling][setting]
    return found


def main(arguments: list[str]) -> int:
    """Writes FILE; returns 0, or 1 after one line that says what went wrong."""
    run, file, settings, *untrained = arguments
    distributed.quiet_libraries()
    values = json.loads(settings)
    judging = JudgingConfig(**{**values, "shots": tuple(values["shots"])})
    try:
        found = judge(Path(run), judging, untrained=bool(untrained))
    except FAILURES as error:
        print(f"judging: {distributed.one_line(error)}", file=sys.stderr)
        return 1
    write_atomically(Path(file), (json.dumps(found, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
