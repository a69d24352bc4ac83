"""Logistic regression on few labelled images, as in MSN (arXiv 2204.07141): rows centred and L2-normed."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from maestri.evals.protocol import Accuracies, FeatureSets, LowshotReport, Setting, StrengthReport
from maestri.evals.sharing import shared_out
from maestri.pipelines.selection import SelectionConfig, select_rows
from maestri.shards.shard_set import ShardSet

MAX_STEPS = 1000
"""L-BFGS steps of a regression at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LowshotSettings:
    """Which few images are labelled, and how strongly weights are held back."""

    shots: tuple[int, ...] = (1, 2, 5)
    """Labelled images of each class."""
    percent: float = 1.0
    """Besides, so many percent of each class, rounded up; 0: not."""
    splits: int = 3
    """Splits of each kind: the images that ``data.select`` takes with seed, seed + 1, …."""
    lists: tuple[Path, ...] = ()
    """Text files of labelled images, one a line, instead of drawn splits; those of one length are splits of a kind."""
    strengths: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
    """Inverse strengths of the L2 penalty, scikit-learn's C."""

    def __post_init__(self) -> None:
        if self.shots and min(self.shots) < 1:
            raise ValueError(f"shots is {list(self.shots)}; each must be at least 1")
        if not 0 <= self.percent <= 100:
            raise ValueError(f"percent is {self.percent}; it must lie in [0, 100]")
        if self.splits < 1:
            raise ValueError(f"splits is {self.splits}; it must be at least 1")
        if not self.strengths or min(self.strengths) <= 0:
            raise ValueError(f"strengths is {list(self.strengths)}; give at least one, each above 0")
        if not self.shots and not self.percent and not self.lists:
            raise ValueError("shots is empty and percent is 0; give one of them, or lists")


def evaluate_lowshot(sets: FeatureSets, settings: LowshotSettings, *, shards: Path, seed: int) -> LowshotReport:
    """Returns accuracies of logistic regressions on few images; every rank must call it, and does a share of them.

    Args:
        sets: the images; their training images are all of ``shards``.
        settings: which are labelled.
        shards: the training shards.
        seed: of the splits.

    Raises:
        ValueError: a class has too few images, or a list does not match the shards.
    """
    splits = labelled_rows(sets, settings, shards=shards, seed=seed)
    first_held = len(sets.train.labels) - sets.num_held_out
    listed = np.unique(np.concatenate([rows for of_kind in splits.values() for rows in of_kind]))
    held = torch.from_numpy(np.setdiff1d(np.arange(first_held, len(sets.train.labels)), listed))
    jobs = [(rows, strength) for of_kind in splits.values() for rows in of_kind for strength in settings.strengths]
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for model, pooling in sets.tables():
        features = sets.train.tables[model][pooling]
        queries = {"holdout": (centred(features[held]), sets.train.labels[held])} if len(held) else {}
        if sets.test is not None:
            queries["test"] = centred(sets.test.tables[model][pooling]), sets.test.labels

        found[model, pooling] = shared_out(jobs, partial(_regression, features, sets.train.labels, queries))
    reports, first = {}, 0
    for kind, of_kind in splits.items():
        last = first + len(of_kind) * len(settings.strengths)
        of_tables = {table: results[first:last] for table, results in found.items()}
        reports[kind] = _report(of_tables, settings.strengths, num_images=tuple(map(len, of_kind)))
        first = last
    return reports


def _regression(
    features: Tensor,
    labels: Tensor,
    queries: Mapping[str, tuple[Tensor, Tensor]],
    job: tuple[NDArray[np.int64], float],
) -> dict[str, float]:
    rows, strength = torch.from_numpy(job[0]), job[1]
    return few_shot_accuracy(centred(features[rows]), labels[rows], queries, strength=strength)


def few_shot_accuracy(
    features: Tensor, labels: Tensor, queries: Mapping[str, tuple[Tensor, Tensor]], *, strength: float
) -> dict[str, float]:
    """Returns top-1 accuracy in percent on each query set of a regression, without intercept, on a few images.

    Args:
        features: ``sample dim``, float32, rows centred and normed.
        labels: int64 ``sample``.
        queries: by name, features and labels of images to classify.
        strength: C.
    """
    regression = LogisticRegression(C=strength, fit_intercept=False, max_iter=MAX_STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the accuracy has long settled after so many steps
        regression.fit(features.numpy(), labels.numpy())
    return {
        name: 100.0 * float(np.mean(regression.predict(of.numpy()) == answers.numpy()))
        for name, (of, answers) in queries.items()
    }


def centred(features: Tensor) -> Tensor:
    """Returns rows of mean 0 and length 1, float32 ``sample dim``: each is centred by its own mean, as in MSN."""
    rows = features.to("cpu", torch.float32)
    return F.normalize(rows - rows.mean(dim=1, keepdim=True), dim=1)


def labelled_rows(
    sets: FeatureSets, settings: LowshotSettings, *, shards: Path, seed: int
) -> dict[str, list[NDArray[np.int64]]]:
    """Returns the rows of each split, by kind; held-out images are in none but listed ones.

    A pure function of the shards, the settings and the seed.

    Raises:
        ValueError: a class has too few images, or a list does not match the shards.
    """
    num_rows = len(sets.train.labels)
    splits: dict[str, list[NDArray[np.int64]]] = {}
    with ShardSet.open(shards) as shard_set:
        if settings.lists:
            for path in settings.lists:
                try:
                    rows = select_rows(shard_set, SelectionConfig(list_file=str(path)), num_rows=num_rows)
                except ValueError as error:
                    raise ValueError(f"{str(error).replace('data.select.list_file', '--lists')} ({shards})") from None
                rows = np.arange(num_rows) if rows is None else rows
                if len(np.unique(sets.train.labels[rows])) < 2:
                    raise ValueError(f"--lists {path} has images of one class only")
                splits.setdefault(f"{len(rows):,} listed", []).append(rows)
            return splits
        bank = num_rows - sets.num_held_out
        _check_counts(sets, bank, settings)
        kinds = {f"{count}-shot": SelectionConfig(per_class=count) for count in settings.shots}
        if settings.percent:
            kinds[f"{settings.percent:g} %"] = SelectionConfig(fraction=settings.percent / 100)
        for kind, config in kinds.items():
            for number in range(settings.splits):
                chosen = SelectionConfig(
                    per_class=config.per_class, fraction=config.fraction, seed=(seed + number) % (1 << 64)
                )
                rows = select_rows(shard_set, chosen, num_rows=bank)
                splits.setdefault(kind, []).append(np.arange(bank) if rows is None else rows)
    return splits


def _check_counts(sets: FeatureSets, bank: int, settings: LowshotSettings) -> None:
    wanted = max((*settings.shots, 1))
    counts = torch.bincount(sets.train.labels[:bank], minlength=sets.num_classes)
    short = torch.nonzero(counts < wanted).flatten().tolist()
    if short:
        others = f" ({len(short)} of {sets.num_classes} classes have fewer)" if len(short) > 1 else ""
        raise ValueError(
            f"shots asks for {wanted} images of each class, but class {sets.class_names[short[0]]!r} has "
            f"{int(counts[short[0]])} that are not held out{others}"
        )


def _report(
    found: Mapping[tuple[str, str], list[dict[str, float]]],
    strengths: tuple[float, ...],
    *,
    num_images: tuple[int, ...],
) -> StrengthReport:
    """Returns means and deviations of accuracies by table, which stand split by split, strength by strength."""
    means: dict[str, Accuracies] = {}
    deviations: dict[str, Accuracies] = {}
    for name in next(iter(found.values()))[0]:
        for kept, over in ((means, mean), (deviations, _deviation)):
            accuracies: dict[str, dict[str, dict[Setting, float]]] = {}
            for (model, pooling), results in found.items():
                accuracies.setdefault(model, {})[pooling] = {
                    strength: over([result[name] for result in results[at :: len(strengths)]])
                    for at, strength in enumerate(strengths)
                }
            kept[name] = accuracies
    return StrengthReport(
        holdout=means.get("holdout", {}),
        holdout_deviation=deviations.get("holdout", {}),
        test=means.get("test", {}),
        test_deviation=deviations.get("test", {}),
        num_images=num_images,
    )


def _deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
