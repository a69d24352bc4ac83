import math

import pytest
import torch

from maestri.model.assignment import Assigner, cross_entropy, me_max, mutual_information, rank_me, sinkhorn


def naive_sinkhorn(scores, temperature, iterations=3):
    """SwAV's algorithm as written: a K × B matrix, normalised in turn."""
    q = torch.exp(scores.double() / temperature).T
    q /= q.sum()
    num_prototypes, num_samples = q.shape
    for _ in range(iterations):
        q /= q.sum(dim=1, keepdim=True) * num_prototypes
        q /= q.sum(dim=0, keepdim=True) * num_samples
    return (q * num_samples).T


def scores(samples=64, prototypes=16, seed=0):
    return torch.rand(samples, prototypes, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_sinkhorn__equals_the_algorithm_as_written():
    torch.testing.assert_close(sinkhorn(scores(), temperature=0.05), naive_sinkhorn(scores(), 0.05).float())


def test_sinkhorn__marginals():
    labels = sinkhorn(scores(), temperature=0.2, iterations=50)
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(labels.sum(dim=0), torch.full((16,), 64 / 16), rtol=1e-3, atol=0)


def test_sinkhorn__undoes_a_collapse_onto_one_prototype():
    collapsed = scores() * 0.1
    collapsed[:, 3] += 0.8
    assert (collapsed.argmax(dim=1) == 3).all()
    used = sinkhorn(collapsed, temperature=0.04).argmax(dim=1).bincount(minlength=16)
    assert (used > 0).sum() > 8


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_sinkhorn__large_scores_stay_finite(shift):
    labels = sinkhorn(scores() + shift, temperature=1.0)
    assert labels.isfinite().all()
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(64))


def test_labels__centring_subtracts_the_running_mean_once_committed():
    assigner = Assigner("centring", num_prototypes=16)
    first = assigner.labels(scores(), temperature=0.1)
    torch.testing.assert_close(first, torch.softmax(scores() / 0.1, dim=-1))
    assigner.commit()
    torch.testing.assert_close(assigner.center, 0.1 * scores().mean(dim=0))
    second = assigner.labels(scores(), temperature=0.1)
    torch.testing.assert_close(second, torch.softmax((scores() - assigner.center) / 0.1, dim=-1))


def test_rollback__leaves_no_trace():
    assigner = Assigner("centring", num_prototypes=16)
    assigner.labels(scores(), temperature=0.1)
    assigner.rollback()
    assigner.commit()
    assert torch.equal(assigner.center, torch.zeros(16))


def test_cross_entropy__equals_torch():
    labels = torch.softmax(scores(seed=1), dim=-1)
    expected = torch.nn.functional.cross_entropy(scores() / 0.1, labels, reduction="none")
    torch.testing.assert_close(cross_entropy(labels, scores(), temperature=0.1), expected)


def test_me_max__zero_when_uniform_and_log_k_when_collapsed():
    uniform = torch.eye(8) * 1e4
    assert me_max(uniform, temperature=1.0).item() == pytest.approx(0.0, abs=1e-5)
    collapsed = torch.zeros(8, 8)
    collapsed[:, 0] = 1e4
    assert me_max(collapsed, temperature=1.0).item() == pytest.approx(math.log(8), abs=1e-5)


def test_me_max__gradient_spreads_predictions():
    logits = torch.zeros(4, 8)
    logits[:, 0] = 1.0
    logits.requires_grad_(True)
    me_max(logits, temperature=0.5).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


def test_mutual_information__tells_both_collapses_from_confident_diversity():
    information, entropy = mutual_information(torch.eye(8) * 1e3, temperature=1.0)
    assert information.item() == pytest.approx(1.0, abs=1e-4) and entropy.item() == pytest.approx(0.0, abs=1e-4)
    for collapsed in (torch.zeros(8, 8), torch.eye(8)[:1].expand(8, -1) * 1e3):
        assert mutual_information(collapsed, temperature=1.0)[0].item() == pytest.approx(0.0, abs=1e-4)


def test_rank_me__counts_dimensions():
    assert rank_me(torch.eye(6)).item() == pytest.approx(6.0, rel=1e-4)
    assert rank_me(torch.ones(6, 4)).item() == pytest.approx(1.0, rel=1e-3)


def test_assigner__iterates_as_often_as_it_is_told() -> None:
    scores = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    for iterations in (1, 3, 50):
        labels = Assigner("sinkhorn", num_prototypes=8, iterations=iterations).labels(scores, temperature=0.3)
        assert torch.equal(labels, sinkhorn(scores, temperature=0.3, iterations=iterations))
    assert (labels.sum(0) - 3).abs().max() < 1e-4, "after many, prototypes are used alike"
