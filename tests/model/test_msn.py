"""MSN.

Golden values were made by running the authors' code (github.com/facebookresearch/msn, commit
4388dc1eadbe3042b85d3296d41b9b207656e043: ``init_model`` of ``src/msn_train.py`` with batch norm around
``VisionTransformer`` of ``src/deit.py`` with eps 1e-6, ``patch_drop`` 0.15, and ``init_msn_loss`` of ``src/losses.py``,
tau = 0.1, T = 0.25, ME-MAX weight 1) in torch 2.15, on a CPU, in float32, with the weights, images and visible tokens
below.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maestri.engine.config import OptimizerConfig
from maestri.engine.parameter_groups import parameter_groups
from maestri.model.build import MethodConfig, check_views
from maestri.model.encoder import EncoderConfig, build_encoder
from maestri.model.levels import MomentumConfig
from maestri.model.method import ViewFacts
from maestri.model.msn import Msn, MsnConfig
from maestri.pipelines.batch import Batch

BATCH = 4


@pytest.fixture
def build(encoder_config):
    def make(*, encoder=encoder_config, **settings):
        torch.manual_seed(0)
        config = MsnConfig(**({"hidden": 24, "projection": 8, "prototypes": 12} | settings))
        method = Msn(build_encoder(encoder, image_size=16), config, num_steps=100)
        method.student.train()
        return method

    return make


@pytest.fixture
def with_local(make_batch):
    """Batches with ``num_local`` local views of 8 × 8."""

    def make(*, views=2, num_local=2, num_masked=4, batch=BATCH):
        found = make_batch(views=views, num_masked=num_masked, batch=batch)
        if not num_local:
            return found
        generator = torch.Generator().manual_seed(1)
        local = torch.randint(0, 256, (num_local, batch, 3, 8, 8), dtype=torch.uint8, generator=generator)
        return replace(found, views={**found.views, "local": local})

    return make


def step_of(method, batch, step=0):
    with torch.no_grad():
        targets = method.targets(batch, step)
    outputs = method.student(batch)
    loss, metrics = method.loss(outputs, targets, step)
    return outputs, targets, loss, metrics


# ------------------------------------------------------------------------------------------- the authors' numbers

GRADIENTS_OF = (
    *("encoder.blocks.0.attn.qkv.weight", "encoder.patch_embed.proj.weight", "encoder.cls_token"),
    *("head.0.weight", "head.4.weight", "prototypes"),
)
GOLDEN = {  # by whether there are focal views, and by balance: cross-entropy, ME-MAX, norms of gradients
    (False, "none"): (
        *(7.661569118499756, 0.7292959690093994),
        *(39.39537048339844, 37.185367584228516, 7.134919166564941),
        *(2.7826340198516846, 2.1261415481567383, 6.3338727951049805),
    ),
    (False, "sinkhorn"): (
        *(5.827253341674805, 0.7292959690093994),
        *(19.94538688659668, 18.016950607299805, 5.557071208953857),
        *(2.09476637840271, 1.6650192737579346, 5.006527423858643),
    ),
    (True, "none"): (
        *(7.35652494430542, 0.7263820171356201),
        *(8.52167797088623, 6.768093109130859, 3.2984766960144043),
        *(1.56186842918396, 1.1349884271621704, 6.3076982498168945),
    ),
    (True, "sinkhorn"): (
        *(6.971481800079346, 0.7263820171356201),
        *(6.728691577911377, 5.542503833770752, 2.8612406253814697),
        *(1.3444677591323853, 0.7852402329444885, 4.789608478546143),
    ),
}


@pytest.mark.parametrize(("focal", "balance"), GOLDEN)
def test_loss__is_the_authors(build, draw_weights, focal, balance):
    encoder = EncoderConfig(patch=4, dim=192, depth=2, heads=3, position="learned")
    method = build(encoder=encoder, balance=balance)
    teacher = method.teachers["target_teacher"].module
    for module, seed in ((method.student, 0), (teacher, 1)):
        draw_weights(module, seed)
        positions = module.get_parameter("encoder.pos_embed").data
        positions.copy_(torch.from_numpy(0.3 * np.random.RandomState(10 + seed).standard_normal((1, 17, 192))))
        if focal:  # one position for all patches, for the authors resample positions in another way
            positions[:, 1:] = positions[:, 1:2].clone()
    stream = np.random.RandomState(2)
    pixels = {"global": stream.randint(0, 256, (3, 6, 3, 16, 16)), "local": stream.randint(0, 256, (2, 6, 3, 8, 8))}
    visible = torch.from_numpy(np.sort(stream.permutation(16)[:13]))
    views = {name: torch.from_numpy(value.astype(np.uint8)) for name, value in pixels.items()}
    batch = Batch(
        views=views if focal else {"global": views["global"]},
        token_mask={},
        visible={"global": visible.expand(3, 6, -1)},
        masked={},
        labels=torch.full((6,), -1),
        rows=torch.arange(6),
        position=0,
    )
    _, _, loss, metrics = step_of(method, batch)
    loss.backward()
    entropy, spread, *gradients = GOLDEN[focal, balance]
    assert loss.item() == pytest.approx(entropy + spread, rel=1e-5)
    assert metrics["loss_class"].item() == pytest.approx(entropy, rel=1e-5)
    assert metrics["me_max_class"].item() == pytest.approx(spread, rel=1e-5)
    own = dict(method.student.named_parameters())
    assert [own[name].grad.norm().item() for name in GRADIENTS_OF] == pytest.approx(gradients, rel=1e-4)


# --------------------------------------------------------------------------------------------------------------- loss


def softmax(scores, temperature):
    sharp = np.exp((scores - scores.max(axis=-1, keepdims=True)) / temperature)
    return sharp / sharp.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("sharpening", [0.25, 1.0])
def test_loss__equals_a_slow_reference(build, sharpening):
    stream = np.random.RandomState(3)
    anchors, target, prototypes = (stream.standard_normal(shape) for shape in ((3 * BATCH, 8), (BATCH, 8), (12, 8)))
    anchors, target, prototypes = (
        each / np.linalg.norm(each, axis=-1, keepdims=True) for each in (anchors, target, prototypes)
    )
    predicted = softmax(anchors @ prototypes.T, 0.2)
    wanted = softmax(target @ prototypes.T, 0.2) ** (1 / sharpening)
    wanted /= wanted.sum(axis=-1, keepdims=True)
    entropy = np.mean([-(wanted[i % BATCH] * np.log(predicted[i])).sum() for i in range(3 * BATCH)])
    mean = predicted.mean(axis=0)
    spread = math.log(12) + (mean * np.log(mean)).sum()

    tensors = [torch.from_numpy(each).float() for each in (anchors @ prototypes.T, prototypes, target)]
    method = build(temperature=0.2, sharpening=sharpening, balance="none", me_max=0.5)
    outputs = {"scores": tensors[0], "prototypes": tensors[1]}
    loss, metrics = method.loss(outputs, {"projections": tensors[2]}, 0)
    assert loss.item() == pytest.approx(entropy + 0.5 * spread, rel=1e-5)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"loss_class": entropy, "me_max_class": spread}, rel=1e-5
    )


def test_loss__no_gradient_reaches_prototypes_through_the_target(build, with_local):
    outputs, targets, _, _ = step_of(build(me_max=0.0), with_local())
    leaf = outputs["prototypes"].detach().requires_grad_(True)
    method = build(me_max=0.0)
    loss, metrics = method.loss({"scores": outputs["scores"].detach(), "prototypes": leaf}, targets, 0)
    assert not loss.requires_grad and "me_max_class" not in metrics


@pytest.mark.parametrize("num_local", [0, 2])
@pytest.mark.parametrize("balance", ["sinkhorn", "none"])
def test_loss__trains_every_parameter_and_no_teacher(build, with_local, num_local, balance):
    method = build(balance=balance)
    _, _, loss, _ = step_of(method, with_local(num_local=num_local))
    loss.backward()
    for name, parameter in method.student.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert trained == parameter.requires_grad, name
    assert all(p.grad is None and not p.requires_grad for p in method.teachers["target_teacher"].module.parameters())


def test_loss__falls_when_trained(build, with_local):
    method, batch = build(balance="none"), with_local(batch=16)
    optimizer = torch.optim.AdamW([p for p in method.student.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(30):
        loss = step_of(method, batch, step)[2]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# ---------------------------------------------------------------------------------------------- who sees what


def test_student__shapes(build, with_local):
    outputs, targets, _, _ = step_of(build(), with_local(views=3))
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "scores": (4 * BATCH, 12),
        "prototypes": (12, 8),
        "class_token": (2 * BATCH, 32),
    }
    assert targets["projections"].shape == (BATCH, 8)
    for vectors in (outputs["prototypes"], targets["projections"]):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)))
    assert outputs["scores"].abs().max() <= 1 + 1e-6


def changed(batch, name, view, token=None):
    """Returns the batch with one view inverted, or only one token of its first sample."""
    pixels = batch.views[name].clone()
    where = (view,)
    if token is not None:
        where = (view, 0, slice(None), *(slice(4 * at, 4 * at + 4) for at in divmod(token, 4)))
    pixels[where] = 255 - pixels[where]
    return replace(batch, views={**batch.views, name: pixels})


def test_views__the_target_is_view_0_whole_and_anchors_are_the_others(build, with_local):
    method, batch = build(), with_local()
    with torch.no_grad():
        scores, target = method.student(batch)["scores"], method.targets(batch, 0)["projections"]
        for name, view, reaches in (("global", 0, "target"), ("global", 1, "anchors"), ("local", 1, "anchors")):
            other = changed(batch, name, view)
            assert torch.equal(method.student(other)["scores"], scores) == (reaches == "target"), name
            assert torch.equal(method.targets(other, 0)["projections"], target) == (reaches == "anchors"), name
        hidden = int(batch.masked["global"][0, 0, 0])
        assert not torch.equal(method.targets(changed(batch, "global", 0, hidden), 0)["projections"], target)


def test_student__never_sees_hidden_tokens_of_anchors(build, make_batch):
    method, batch = build(), make_batch(num_masked=4)
    with torch.no_grad():
        scores = method.student(batch)["scores"]
        for token in range(16):
            same = torch.equal(method.student(changed(batch, "global", 1, token))["scores"], scores)
            assert same == bool(batch.token_mask["global"][1, 0, token]), token


def test_student__local_views_are_a_batch_of_their_own_to_the_batch_norm(build, with_local):
    method = build()
    with torch.no_grad():
        alone, beside = (method.student(with_local(num_local=count))["scores"] for count in (0, 2))
    assert torch.equal(beside[:BATCH], alone)


# ------------------------------------------------------------------------------------------- teacher, state, monitors


def test_teacher__is_encoder_and_head_without_prototypes_and_drop_path(build, with_local):
    method = build(encoder=EncoderConfig(patch=4, dim=32, depth=2, heads=4, drop_path=0.5))
    teacher, student = method.teachers["target_teacher"], method.student.state_dict()
    own = teacher.module.state_dict()
    assert own.keys() == student.keys() - {"prototypes"} and teacher.follows == ("encoder.", "head.")
    assert all(torch.equal(value, student[name]) for name, value in own.items())
    first, second = (method.targets(with_local(), 0)["projections"] for _ in range(2))
    assert torch.equal(first, second)
    (group,) = (group for group in parameter_groups(method, OptimizerConfig()) if "prototypes" in group["names"])
    assert group["names"] == ["prototypes"] and group["is_prototypes"] and group["weight_decay"] == 0


def test_teacher__momentum_rises_along_a_line(build):
    momentum = build(momentum=MomentumConfig(start=0.9, end=1.0)).teachers["target_teacher"].momentum
    assert [momentum(step) for step in (0, 25, 50, 100, 200)] == pytest.approx([0.9, 0.925, 0.95, 1.0, 1.0])


def test_monitors__tell_of_assignments_before_balancing(build, with_local):
    method = build()
    outputs, targets, _, _ = step_of(method, with_local())
    figures = method.monitors(outputs, targets)
    assert {f"information_class_{who}" for who in ("student", "teacher")} <= figures.keys()
    one = {**targets, "projections": F.normalize(torch.ones(BATCH, 8), dim=-1)}
    assert abs(method.monitors(outputs, one)["information_class_teacher"]) < 1e-6
    assert 1 <= figures["rank_me"] <= BATCH


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"num_views": 1}, r"views\.count is 1; method msn takes view 0 as the target"),
        ({"num_masked": None}, r"views\.mask\.spread and views\.mask\.unmasked must be 0: method msn"),
        ({"corrupted": True}, r"views\.corruption\.coverage"),
    ],
)
def test_check_views__names_the_field(facts, line):
    with pytest.raises(ValueError, match=line):
        check_views(MethodConfig(name="msn"), ViewFacts(**({"num_views": 2, "num_masked": 3} | facts)))


@pytest.mark.parametrize("facts", [{"num_masked": 0}, {"num_views": 3}, {"num_local": 10}])
def test_check_views__enough(facts):
    check_views(MethodConfig(name="msn"), ViewFacts(**({"num_views": 2, "num_masked": 3} | facts)))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"temperature": 0.0}, r"msn\.temperature is 0\.0; it must be above 0"),
        ({"sharpening": 1.5}, r"msn\.sharpening is 1\.5"),
        ({"sharpening": 0.0}, r"msn\.sharpening is 0\.0"),
        ({"hidden": 0}, r"msn\.hidden is 0"),
        ({"sinkhorn_iterations": 0}, r"msn\.sinkhorn_iterations is 0"),
        ({"prototypes": 1}, r"msn\.prototypes is 1; at least 2 are needed"),
        ({"me_max": -1.0}, r"msn\.me_max is -1\.0"),
    ],
)
def test_config__names_the_field(settings, line):
    with pytest.raises(ValueError, match=line):
        MsnConfig(**settings)
