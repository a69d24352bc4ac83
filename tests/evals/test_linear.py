import warnings

import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from maestri.evals.linear import LinearSettings, Probes, batch_size, evaluate_linear, train_probes
from maestri.evals.protocol import FeatureSets


def test_train_probes__not_a_point_below_the_best_logistic_regression(digits):
    images, labels = digits
    settings = LinearSettings()
    probes = train_probes(images[:1200], labels[:1200], num_classes=10, rates=settings.rates, epochs=30, seed=0)
    ours = max(probes.accuracy(images[1200:], labels[1200:]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fits = [LogisticRegression(C=c, max_iter=300).fit(images[:1200], labels[:1200]) for c in (1e-3, 1e-2, 0.1, 1)]
    theirs = max(100 * fit.score(images[1200:], labels[1200:]) for fit in fits)
    assert theirs > 96
    assert ours >= theirs - 1


def test_train_probes__together_as_alone(digits):
    """Each rate's probe is what torch's SGD at that rate makes of it."""
    images, labels = digits[0][:256], digits[1][:256]
    rates = (0.1, 1.0)
    together = train_probes(images, labels, num_classes=10, rates=rates, epochs=3, seed=4)
    for at, rate in enumerate(rates):
        alone = plain_probe(images, labels, rate=rate, epochs=3, seed=4)
        torch.testing.assert_close(together.weight[at], alone.weight[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.bias[at], alone.bias[0], rtol=1e-4, atol=1e-5)


def plain_probe(images: torch.Tensor, labels: torch.Tensor, *, rate: float, epochs: int, seed: int) -> Probes:
    """Returns one probe, trained by SGD with the rate as its rate."""
    size = batch_size(len(labels))
    probe = Probes(num_rates=1, dim=images.shape[1], num_classes=10).train()
    optimizer = torch.optim.SGD(probe.parameters(), lr=rate * size / 256, momentum=0.9)
    steps = epochs * (len(labels) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(size):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(probe(images[rows])[:, 0], labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return probe


@pytest.mark.parametrize(
    ("images", "expected"), [(20, 20), (100, 32), (1200, 32), (5000, 64), (60_000, 1024), (10**6, 1024)]
)
def test_batch_size__shrinks_with_the_set(images: int, expected: int):
    assert batch_size(images) == expected


def test_evaluate_linear__every_rate_on_both_splits(sets: FeatureSets):
    report = evaluate_linear(sets, LinearSettings(rates=(0.01, 0.1), epochs=5), seed=0)
    assert set(report.holdout["student"]) == {"cls", "mean"}
    assert set(report.test["student"]["mean"]) == {0.01, 0.1}
    assert report.choice("student")[0] == "mean", "the whole image tells more than its upper half"
    assert report.chosen("student") > 90
    again = evaluate_linear(sets, LinearSettings(rates=(0.01, 0.1), epochs=5), seed=0)
    assert again == report


def test_train_probes__half_precision_and_a_constant_column(digits):
    images, labels = digits
    assert bool((images[:, 0] == 0).all())
    probes = train_probes(images[:600].half(), labels[:600], num_classes=10, rates=(0.3,), epochs=5, seed=0)
    assert bool(probes.weight.isfinite().all()) and probes.accuracy(images[600:], labels[600:])[0] > 85


@pytest.mark.parametrize("wrong", [{"rates": ()}, {"rates": (0.1, 0.0)}, {"epochs": 0}])
def test_settings__range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LinearSettings(**wrong)
