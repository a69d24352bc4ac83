import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from maestri.evals.knn import KnnSettings, evaluate_knn, knn_accuracy


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
    assert ours == pytest.approx(expected, abs=0.05)
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


def test_evaluate_knn__held_out_images_have_the_others_as_neighbours(sets):
    report = evaluate_knn(sets, KnnSettings(k=(3, 9)))
    images, labels = sets.train.tables["student"]["mean"], sets.train.labels
    alone = {"k": (3, 9), "temperature": 0.07}
    assert report.holdout["student"]["mean"] == knn_accuracy(
        images[:900], labels[:900], images[900:], labels[900:], **alone
    )
    test = sets.test
    assert report.test["student"]["mean"] == knn_accuracy(
        images, labels, test.tables["student"]["mean"], test.labels, **alone
    ), "test images have all of them"


@pytest.mark.parametrize("wrong", [{"k": ()}, {"k": (0,)}, {"k": (1,), "temperature": 0.0}])
def test_settings__range(wrong):
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        KnnSettings(**wrong)
