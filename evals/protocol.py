"""The k-NN protocol: what is compared on which images, and what is chosen where.

Pooling and number of neighbours (and, for the headline, the model) are chosen on held-out training images, whose
neighbours are the images trained on.  Test images are classified among all training images, once for every choice, and
everything is reported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from maestri.evals.features import Extractor, ImageSettings, extract_features
from maestri.evals.knn import knn_accuracy
from maestri.shards.shard_set import ShardSet


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnSettings:
    """What the neighbours' vote is."""

    k: tuple[int, ...]
    """Numbers of neighbours."""
    temperature: float
    """Temperature of the votes' weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnSplits:
    """Which images are neighbours and which are classified."""

    shards: Path
    """Training shards."""
    holdout: int
    """Images at the end of ``shards`` that were not trained on."""
    test_shards: Path | None
    """Test shards."""
    max_train: int = 0
    """Neighbours at most; 0 = all."""
    max_test: int = 0
    """Classified images at most, per split; 0 = all."""


Accuracies = dict[str, dict[str, dict[int, float]]]
"""model → pooling → k → top-1 in percent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnReport:
    """Accuracies of every model, and the choices made on held-out training images."""

    holdout: Accuracies = field(default_factory=dict)
    """On held-out training images; empty without any."""
    test: Accuracies = field(default_factory=dict)
    """On test images; empty without any."""

    def choice(self, model: str) -> tuple[str, int]:
        """Returns the pooling and k that are best for a model on held-out images (on test images without any)."""
        table = (self.holdout or self.test)[model]
        return max(((pooling, k) for pooling in table for k in table[pooling]), key=lambda at: table[at[0]][at[1]])

    def chosen(self, model: str) -> float:
        """Returns a model's accuracy at its choice: on test images if there are any, else on held-out ones."""
        pooling, k = self.choice(model)
        return (self.test or self.holdout)[model][pooling][k]

    def best(self, models: tuple[str, ...]) -> str:
        """Returns the model that is best on held-out images, each at its own choice."""
        table = self.holdout or self.test

        def score(model: str) -> float:
            pooling, k = self.choice(model)
            return table[model][pooling][k]

        return max((model for model in models if model in table), key=score)

    def as_plain(self) -> dict[str, Any]:
        """Returns plain dicts for JSON; keys are strings."""
        return {
            split: {
                model: {pooling: {str(k): value for k, value in row.items()} for pooling, row in table.items()}
                for model, table in accuracies.items()
            }
            for split, accuracies in (("holdout", self.holdout), ("test", self.test))
        }


def evaluate_knn(
    extractors: Mapping[str, Extractor],
    splits: KnnSplits,
    images: ImageSettings,
    settings: KnnSettings,
    *,
    with_test: bool = True,
) -> KnnReport:
    """Returns k-NN accuracies of every extractor; every rank must call it.

    Args:
        extractors: by the name of the model.
        splits: the images.
        images: how they are made.
        settings: the vote.
        with_test: whether test images are classified (and held-out ones used as neighbours for them).

    Raises:
        ValueError: there is nothing to classify, or labels are missing.
    """
    with ShardSet.open(splits.shards) as train:
        num_rows = len(train)
        if splits.holdout >= num_rows:
            raise ValueError(f"data.holdout is {splits.holdout}, but {splits.shards} holds only {num_rows} images")
        num_held = _limit(splits.holdout, splits.max_test)
        first_held = num_rows - splits.holdout
        num_bank = _limit(first_held, splits.max_train)
        classify_test = with_test and splits.test_shards is not None
        if not num_held and not classify_test:
            raise ValueError("nothing to classify: set data.holdout or data.test_shards")
        rows = np.concatenate([np.arange(num_bank), np.arange(first_held, first_held + num_held)])
        features, labels = extract_features(extractors, train, rows, images)
    holdout: Accuracies = {}
    if num_held:
        bank, held = slice(0, num_bank), slice(num_bank, None)
        holdout = _accuracies(_at(features, bank), labels[bank], _at(features, held), labels[held], settings)
    if not classify_test:
        return KnnReport(holdout=holdout)
    assert splits.test_shards is not None
    with ShardSet.open(splits.test_shards) as test:
        test_rows = np.arange(_limit(len(test), splits.max_test))
        test_features, test_labels = extract_features(extractors, test, test_rows, images)
    return KnnReport(holdout=holdout, test=_accuracies(features, labels, test_features, test_labels, settings))


Features = Mapping[str, Mapping[str, Tensor]]


def _limit(count: int, most: int) -> int:
    return min(count, most) if most else count


def _at(features: Features, rows: slice) -> Features:
    return {name: {pooling: values[rows] for pooling, values in table.items()} for name, table in features.items()}


def _accuracies(
    bank: Features, bank_labels: Tensor, queries: Features, labels: Tensor, settings: KnnSettings
) -> Accuracies:
    return {
        name: {
            pooling: knn_accuracy(
                values, bank_labels, queries[name][pooling], labels, k=settings.k, temperature=settings.temperature
            )
            for pooling, values in table.items()
        }
        for name, table in bank.items()
    }
