"""k-means clusters of frozen features, compared with classes."""

import warnings
from dataclasses import dataclass
from functools import partial
from statistics import mean, stdev

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    normalized_mutual_info_score,
)
from sklearn.metrics.cluster import contingency_matrix

from maestri.evals.protocol import (
    MEASURES,
    Accuracies,
    ClusterReport,
    FeatureSets,
    LabelledFeatures,
    Setting,
    Spread,
    Spreads,
)
from maestri.evals.sharing import shared_out


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSettings:
    """How often k-means runs."""

    runs: int = 10
    """Runs of k-means, each from a seed of its own: seed, seed + 1, …."""

    def __post_init__(self) -> None:
        if self.runs < 1:
            raise ValueError(f"runs is {self.runs}; it must be at least 1")


def evaluate_clusters(sets: FeatureSets, settings: ClusterSettings, *, seed: int) -> ClusterReport:
    """Returns how well clusters agree with classes; every rank must call it.  Runs are shared out over ranks.

    Held-out and test images are clustered apart, each into as many clusters as there are classes.
    """
    holdout = _spreads(sets, sets.held_out, settings, seed)
    test = _spreads(sets, sets.test, settings, seed)
    return ClusterReport(
        holdout=_accuracies(holdout, sets.num_classes),
        test=_accuracies(test, sets.num_classes),
        holdout_measures=holdout,
        test_measures=test,
    )


def cluster_measures(
    features: NDArray[np.float32], labels: NDArray[np.int64], num_clusters: int, seed: int
) -> tuple[float, ...]:
    """Returns inertia and then the measures, in percent, of one run of k-means.

    Args:
        features: ``sample dim``.
        labels: ``sample``.
        num_clusters: clusters.
        seed: of the run.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different images than clusters
        fit = KMeans(num_clusters, n_init=1, random_state=seed).fit(features)
    found = fit.labels_
    scores = (
        hungarian_accuracy(labels, found),
        normalized_mutual_info_score(labels, found),
        adjusted_rand_score(labels, found),
        adjusted_mutual_info_score(labels, found),
    )
    return (float(fit.inertia_), *(100.0 * float(score) for score in scores))


def hungarian_accuracy(labels: NDArray[np.int64], clusters: NDArray[np.int32]) -> float:
    """Returns the share of images in the cluster that is matched with their class, clusters and classes one to one."""
    counts = contingency_matrix(labels, clusters)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels))


def _spreads(sets: FeatureSets, images: LabelledFeatures | None, settings: ClusterSettings, seed: int) -> Spreads:
    if images is None:
        return {}
    found: dict[str, dict[str, dict[str, Spread]]] = {}
    labels = images.labels.numpy()
    for model, pooling in sets.tables():
        rows = F.normalize(images.tables[model][pooling].to("cpu").float(), dim=1).numpy()
        measures = partial(cluster_measures, rows, labels, sets.num_classes)
        runs = shared_out(range(seed, seed + settings.runs), measures)
        lowest = min(runs)
        found.setdefault(model, {})[pooling] = {
            measure: Spread(
                mean=mean(values := [run[at] for run in runs]),
                deviation=stdev(values) if len(values) > 1 else 0.0,
                lowest_inertia=lowest[at],
            )
            for at, measure in enumerate(MEASURES, 1)
        }
    return found


def _accuracies(spreads: Spreads, num_clusters: int) -> Accuracies:
    found: dict[str, dict[str, dict[Setting, float]]] = {}
    for model, table in spreads.items():
        found[model] = {pooling: {num_clusters: measures["accuracy"].mean} for pooling, measures in table.items()}
    return found
