"""Which images are judged: training images, the held-out ones among them, and test images."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maestri.evals.features import Table
from maestri.evals.protocol import FeatureSets, LabelledFeatures
from maestri.evals.sharing import agreeing
from maestri.shards.shard_set import ShardSet

ReadFeatures = Callable[[ShardSet, NDArray[np.int64]], Mapping[str, Table]]
"""Features of rows, by model."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """Which images are learnt from and which are classified."""

    shards: Path
    """Training shards."""
    holdout: int
    """Images at the end of ``shards`` that choices are made on."""
    test_shards: Path | None
    """Test shards."""
    max_train: int = 0
    """Training images at most, held-out ones apart; 0 = all."""
    max_test: int = 0
    """Classified images at most, per split; 0 = all."""


def read_labels(splits: Splits, *, device: torch.device, with_test: bool = True) -> FeatureSets:
    """Returns the images that protocols work on, without features: enough to check settings; every rank must call it.

    Args:
        splits: which images.
        device: where protocols are to compute.
        with_test: whether test images are wanted.

    Raises:
        ValueError: there is nothing to classify, labels are missing, or the sets differ in classes.
    """
    test_shards = splits.test_shards if with_test else None
    with agreeing():
        check_sets(splits.shards, test_shards, splits.holdout)
        if not splits.holdout and test_shards is None:
            raise ValueError("there is nothing to classify: give test shards, or hold training images out")
    test = None
    with ShardSet.open(splits.shards) as train_set:
        rows = _train_rows(splits, len(train_set))
        train = LabelledFeatures(labels=_labels(train_set, rows))
        class_names = train_set.manifest.class_names
    if test_shards is not None:
        with ShardSet.open(test_shards) as test_set:
            test = LabelledFeatures(labels=_labels(test_set, _test_rows(splits, len(test_set))))
    num_held = _limit(splits.holdout, splits.max_test)
    return FeatureSets(train=train, num_held_out=num_held, test=test, class_names=class_names, device=device)


def read_features(sets: FeatureSets, splits: Splits, read: ReadFeatures) -> FeatureSets:
    """Returns the same images with features; every rank must call it.

    Args:
        sets: from ``read_labels``.
        splits: that it was given.
        read: computes features, or finds them.
    """
    test = sets.test
    with ShardSet.open(splits.shards) as train_set:
        train = replace(sets.train, tables=read(train_set, _train_rows(splits, len(train_set))))
    if test is not None:
        assert splits.test_shards is not None
        with ShardSet.open(splits.test_shards) as test_set:
            test = replace(test, tables=read(test_set, _test_rows(splits, len(test_set))))
    return replace(sets, train=train, test=test)


def check_sets(shards: Path, test_shards: Path | None, holdout: int) -> int:
    """Returns the number of training images that are not held out, after a look at labels and classes.

    Raises:
        ValueError: a set is missing, has no labels or other classes than the other, or is smaller than the holdout.
    """
    with ShardSet.open(shards) as train:
        names = _check_labels(train)
        num_bank = len(train) - holdout
        if num_bank <= 0:
            raise ValueError(f"holdout is {holdout}, but {shards} holds only {len(train)} images")
    if test_shards is not None:
        with ShardSet.open(test_shards) as test:
            test_names = _check_labels(test)
        if len(test_names) != len(names):
            raise ValueError(f"{shards} has {len(names)} classes, but {test_shards} has {len(test_names)}")
        differing = [pair for pair in zip(names, test_names, strict=True) if pair[0] != pair[1]]
        if differing:
            mine, theirs = differing[0]
            _logger.warning(
                "%d of %d classes are called otherwise in the test shards, the first: %r and %r; taken to be the same",
                *(len(differing), len(names), mine, theirs),
            )
    return num_bank


def _check_labels(shard_set: ShardSet) -> tuple[str, ...]:
    """Returns the names of classes."""
    names = shard_set.manifest.class_names
    if not names:
        raise ValueError(f"evaluation needs labels, and {shard_set.folder} has none; convert it from class folders")
    wrong = np.flatnonzero((shard_set.columns.label < 0) | (shard_set.columns.label >= len(names)))
    if len(wrong):
        raise ValueError(
            f"evaluation needs labels: {len(wrong)} of {len(shard_set)} images of {shard_set.folder} are of none of "
            f"its {len(names)} classes; the first is {shard_set.key(int(wrong[0]))}"
        )
    return names


def _train_rows(splits: Splits, num_rows: int) -> NDArray[np.int64]:
    """Returns the rows of training images, held-out ones last."""
    first_held = num_rows - splits.holdout
    held = np.arange(first_held, first_held + _limit(splits.holdout, splits.max_test))
    return np.concatenate([np.arange(_limit(first_held, splits.max_train)), held])


def _test_rows(splits: Splits, num_rows: int) -> NDArray[np.int64]:
    return np.arange(_limit(num_rows, splits.max_test))


def _labels(shard_set: ShardSet, rows: NDArray[np.int64]) -> Tensor:
    """Returns labels, int64 ``sample``: the first where there are several."""
    return torch.from_numpy(shard_set.label(rows))


def _limit(count: int, most: int) -> int:
    return min(count, most) if most else count
