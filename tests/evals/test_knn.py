import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from maestri.evals.knn import knn_accuracy


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    return torch.from_numpy(images[order]).float(), torch.from_numpy(labels[order]).long()


@pytest.mark.parametrize("k", [1, 10, 20])
def test_knn_accuracy__equals_scikit_learn(digits, k):
    images, labels = digits
    bank, queries = images[:1200], images[1200:]
    ours = knn_accuracy(bank, labels[:1200], queries, labels[1200:], k=(k,), temperature=0.07, chunk=100)[k]

    def weights(distances):
        return np.exp((1 - distances) / 0.07)

    theirs = KNeighborsClassifier(k, metric="cosine", weights=weights, algorithm="brute")
    theirs.fit(bank.numpy(), labels[:1200].numpy())
    expected = 100 * theirs.score(queries.numpy(), labels[1200:].numpy())
    assert ours == pytest.approx(expected, abs=0.2)  # one of 597 may tie in float32
    assert ours > 90


def test_knn_accuracy__several_k_in_one_search(digits):
    images, labels = digits
    settings = {"temperature": 0.07}
    both = knn_accuracy(images[:500], labels[:500], images[500:700], labels[500:700], k=(1, 20), **settings)
    for k in (1, 20):
        alone = knn_accuracy(images[:500], labels[:500], images[500:700], labels[500:700], k=(k,), **settings)
        assert alone[k] == both[k]


def test_knn_accuracy__missing_labels(digits):
    images, labels = digits
    with pytest.raises(ValueError, match="needs labels"):
        knn_accuracy(images[:50], labels[:50] * 0 - 1, images[:5], labels[:5], k=(1,), temperature=0.07)


def test_knn_accuracy__too_few_neighbours(digits):
    images, labels = digits
    with pytest.raises(ValueError, match="only 10 labelled"):
        knn_accuracy(images[:10], labels[:10], images[:5], labels[:5], k=(20,), temperature=0.07)
