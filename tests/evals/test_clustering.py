import itertools

import numpy as np
import pytest
import torch

from maestri.evals.clustering import ClusterSettings, cluster_measures, evaluate_clusters, hungarian_accuracy
from maestri.evals.protocol import MEASURES, FeatureSets, LabelledFeatures


def test_hungarian_accuracy__is_that_of_the_best_renaming():
    generator = np.random.default_rng(0)
    labels, clusters = generator.integers(0, 4, 50), generator.integers(0, 4, 50)
    best = max(np.mean(np.array(names)[clusters] == labels) for names in itertools.permutations(range(4)))
    assert hungarian_accuracy(labels, clusters) == pytest.approx(best)


def test_hungarian_accuracy__fewer_clusters_than_classes():
    assert hungarian_accuracy(np.array([0, 0, 1, 2]), np.array([1, 1, 1, 1])) == 0.5


def test_cluster_measures__perfect_clusters_are_100_percent():
    labels = np.repeat(np.arange(3), 10)
    features = np.eye(3, dtype=np.float32)[labels] + np.random.default_rng(0).normal(0, 0.01, (30, 3)).astype("float32")
    assert cluster_measures(features, labels, num_clusters=3, seed=1)[1:] == pytest.approx((100.0,) * 4)


def test_evaluate_clusters__digits(sets: FeatureSets):
    report = evaluate_clusters(sets, ClusterSettings(runs=4), seed=0)
    assert report == evaluate_clusters(sets, ClusterSettings(runs=4), seed=0)
    spreads = report.test_measures["student"]["mean"]
    assert set(spreads) == set(MEASURES)
    assert 65 < spreads["accuracy"].mean < 90 and spreads["accuracy"].deviation > 0
    assert report.test["student"]["mean"][10] == spreads["accuracy"].mean
    assert report.choice("student") == ("mean", 10)


def test_evaluate_clusters__lowest_inertia_is_one_of_the_runs(sets: FeatureSets):
    images = sets.test
    assert images is not None
    rows = torch.nn.functional.normalize(images.tables["student"]["mean"], dim=1).numpy()
    runs = [cluster_measures(rows, images.labels.numpy(), num_clusters=10, seed=seed) for seed in (3, 4, 5)]
    found = evaluate_clusters(sets, ClusterSettings(runs=3), seed=3).test_measures["student"]["mean"]
    assert found["accuracy"].lowest_inertia == min(runs)[1]
    assert found["NMI"].mean == pytest.approx(np.mean([run[2] for run in runs]))
    assert found["NMI"].deviation == pytest.approx(np.std([run[2] for run in runs], ddof=1))


def test_evaluate_clusters__equal_images_are_no_error():
    same = LabelledFeatures(labels=torch.arange(20) % 2, tables={"student": {"cls": torch.ones(20, 4)}})
    sets = FeatureSets(train=same, num_held_out=0, test=same, class_names=("a", "b"))
    report = evaluate_clusters(sets, ClusterSettings(runs=2), seed=0)
    assert report.test["student"]["cls"][2] == 50.0 and not report.holdout
