"""What keeps labels from collapse equals the published algorithms, on recorded and on computed values.

The recorded values are what facebookresearch/msn at commit 4388dc1eadbe3042b85d3296d41b9b207656e043 gives: the loss of
``init_msn_loss`` (src/losses.py, tau = 0.1, one anchor view) for the inputs below with one-hot prototype labels and
T = 0.25, without and with ``use_sinkhorn``; its ``rloss`` and the gradient of that to the anchors; its targets.  They
were made once, in float32, with PyTorch 2.15 on a CPU.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maestri.model.assignment import Assigner, cross_entropy, me_max
from maestri.model.heads import HeadConfig
from maestri.model.levels import LevelConfig, level_loss, new_assigner

TAU, SHARPEN = 0.1, 0.25
ENTROPY = {False: 4.72880220413208, True: 4.674001693725586}
ME_MAX = 0.04623675346374512
SHARPENED = [
    [8.4586233e-01, 9.0781811e-07, 1.5413673e-01, 8.4616876e-16, 1.3559893e-14],
    [1.3449709e-09, 9.9999964e-01, 3.3764363e-07, 1.5037929e-09, 5.2629376e-16],
    [2.8399144e-13, 9.2627521e-04, 5.3227789e-13, 3.2493789e-04, 9.9874884e-01],
    [7.0730454e-01, 2.2414651e-10, 3.3165687e-03, 6.6706076e-12, 2.8937888e-01],
    [7.7284611e-04, 5.2894894e-16, 3.2802910e-04, 9.9889868e-01, 4.7033581e-07],
    [5.6027464e-05, 1.2687562e-03, 7.7568489e-04, 5.0942204e-04, 9.9739003e-01],
    [2.0146836e-01, 4.0569399e-11, 7.2692096e-01, 1.2046260e-06, 7.1609475e-02],
    [2.6889819e-01, 1.8247512e-06, 7.3110002e-01, 2.6108065e-13, 3.4937647e-17],
]
BALANCED = [
    [7.8520644e-01, 6.2976992e-06, 2.1478726e-01, 5.9512048e-15, 7.8451175e-15],
    [1.7997578e-10, 9.9999994e-01, 6.7823152e-08, 1.5245898e-09, 4.3892311e-17],
    [4.4946051e-13, 1.0955326e-02, 1.2645703e-12, 3.8962823e-03, 9.8514843e-01],
    [7.9237628e-01, 1.8765320e-09, 5.5774059e-03, 5.6617957e-11, 2.0204630e-01],
    [1.0210223e-04, 5.2222170e-16, 6.5053828e-05, 9.9983281e-01, 3.8726601e-08],
    [8.8068526e-05, 1.4903799e-02, 1.8303044e-03, 6.0668220e-03, 9.7711098e-01],
    [1.5065190e-01, 2.2670718e-10, 8.1596810e-01, 6.8247027e-06, 3.3373158e-02],
    [1.9679493e-01, 9.9799563e-06, 8.0319506e-01, 1.4476531e-12, 1.5935980e-17],
]
# Of the second anchor and the fourth.
ME_MAX_GRADIENT = [
    [2.84424070e-02, -8.09081551e-03, 1.16118928e-03, -4.86975908e-03]
    + [-1.24403066e-03, -1.59593429e-02, 2.24577654e-02, 1.82603206e-02],
    [9.94780473e-03, 1.12599190e-02, -1.16561707e-02, 2.55384184e-02]
    + [1.37951765e-02, -1.58795584e-02, -9.27195244e-04, 3.81366769e-03],
]


@pytest.fixture(scope="module")
def inputs():
    """Anchors and targets ``8 8``, prototypes ``5 8``; RandomState's stream is frozen by NumPy's policy."""
    stream = np.random.RandomState(0)
    return [torch.from_numpy(stream.standard_normal(shape).astype(np.float32)) for shape in ((8, 8), (8, 8), (5, 8))]


def similarities(samples, prototypes):
    return F.normalize(samples, dim=-1) @ F.normalize(prototypes, dim=-1).T


def level(**settings):
    return LevelConfig(head=HeadConfig(prototypes=5), **settings)


def labels_of(inputs, *, balance):
    assigner = new_assigner(level(balance=balance, sinkhorn_start="probabilities"))
    return assigner.labels(similarities(inputs[1], inputs[2]), temperature=TAU * SHARPEN)


@pytest.mark.parametrize(("balance", "expected"), [("none", SHARPENED), ("sinkhorn", BALANCED)])
def test_labels__equal_msn(inputs, balance, expected):
    # Below 1e-7 a float32 exponent of up to 80 has lost the fifth digit, in theirs as in ours.
    torch.testing.assert_close(labels_of(inputs, balance=balance), torch.tensor(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("balance", ["none", "sinkhorn"])
def test_level_loss__equals_msn(inputs, balance):
    scores = similarities(inputs[0], inputs[2])
    total, parts = level_loss(
        "class", level(me_max=1.0), labels=labels_of(inputs, balance=balance), scores=scores, temperature=TAU
    )
    entropy = ENTROPY[balance == "sinkhorn"]
    assert float(parts["loss_class"]) == pytest.approx(entropy, rel=1e-5)
    assert float(parts["me_max_class"]) == pytest.approx(ME_MAX, rel=1e-5)
    assert float(total) == pytest.approx(entropy + ME_MAX, rel=1e-5)


def test_level_loss__of_tokens_equals_msn_of_as_many_samples(inputs):
    scores = similarities(inputs[0], inputs[2]).view(2, 4, 5)
    labels = labels_of(inputs, balance="sinkhorn").view(2, 4, 5)
    _, parts = level_loss("patch", level(me_max=1.0), labels=labels, scores=scores, temperature=TAU)
    assert float(parts["loss_patch"]) == pytest.approx(ENTROPY[True], rel=1e-5)
    assert float(parts["me_max_patch"]) == pytest.approx(ME_MAX, rel=1e-5)


def test_me_max__gradient_equals_msn(inputs):
    anchors = inputs[0].clone().requires_grad_(True)
    me_max(similarities(anchors, inputs[2]), temperature=TAU).backward()
    torch.testing.assert_close(anchors.grad[[1, 3]], torch.tensor(ME_MAX_GRADIENT), rtol=1e-4, atol=1e-7)


def test_sinkhorn__starts_differ_but_agree_once_converged(inputs):
    scores = similarities(inputs[1], inputs[2])
    found = {
        (start, iterations): Assigner("sinkhorn", num_prototypes=5, iterations=iterations, start=start).labels(
            scores, temperature=0.3
        )
        for start in ("scores", "probabilities")
        for iterations in (1, 300)
    }
    torch.testing.assert_close(found["scores", 300], found["probabilities", 300], rtol=1e-4, atol=1e-6)
    assert (found["scores", 1] - found["probabilities", 1]).abs().max() > 1e-3


def test_centring__equals_dino_computed_apart():
    """DINO (arXiv 2104.14294), algorithm 1 and equation 4, in float64: labels by the centre before, then its update."""
    stream = np.random.RandomState(1)
    assigner, centre = Assigner("centring", num_prototypes=5, center_momentum=0.9), np.zeros(5)
    for _ in range(4):
        teacher, student = stream.standard_normal((2, 8, 5))
        sharp = np.exp((teacher - centre) / 0.04)
        expected = sharp / sharp.sum(1, keepdims=True)
        soft = np.exp(student / 0.1)
        entropy = -(expected * np.log(soft / soft.sum(1, keepdims=True))).sum(1).mean()
        centre = 0.9 * centre + 0.1 * teacher.mean(0)

        labels = assigner.labels(torch.from_numpy(teacher).float(), temperature=0.04)
        loss = cross_entropy(labels, torch.from_numpy(student).float(), temperature=0.1).mean()
        assigner.commit()
        np.testing.assert_allclose(labels.numpy(), expected, rtol=1e-4, atol=1e-7)
        assert float(loss) == pytest.approx(entropy, rel=1e-5)
        np.testing.assert_allclose(assigner.center.numpy(), centre, rtol=1e-5, atol=1e-7)
