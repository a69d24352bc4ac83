"""SdAE.

Golden values are what AbrahamYabo/SdAE at commit 2e08b319827630875a92b96c3373cdc76c21cac0 gives:
``train_one_epoch_ema`` (engine_pretrain.py) over one batch, with ``MaskedAutoencoderViT`` (models_mae.py), the teacher
``VisionTransformer`` (models_teacher.py), ``shrink_num`` = hidden tokens and ``ncrop_loss`` = folds, for the weights,
images and noise of the fixtures, in float32, with PyTorch 2.15 and timm 1.0.31 on a CPU.  It got images normalised by
ImageNet's mean and deviation, and its teacher the student's fixed positions.  Those over channels were made by the same
function with ``dim=-1`` in its call of ``cosine_similarity``, whose default is the axis of tokens.
"""

import logging
from dataclasses import replace

import pytest
import torch

from maestri.model import draws
from maestri.model.build import MethodConfig
from maestri.model.build import check_views as check_method_views
from maestri.model.decoder import DecoderConfig
from maestri.model.encoder import EncoderConfig, build_encoder
from maestri.model.levels import MomentumConfig
from maestri.model.method import ViewFacts
from maestri.model.sdae import Sdae, SdaeConfig

# By axis, folds and hidden tokens: the loss, and norms of its gradients.  Of 11 hidden tokens, two belong to no fold.
PATCHES, MASK_TOKEN, HEAD = "encoder.patch_embed.proj.weight", "decoder.mask_token", "decoder.head.weight"
GOLDEN = {
    ("token", 3, 12): (1.0184364318847656, 0.18627727031707764, 0.41678789258003235, 1.2393659353256226),
    ("token", 3, 11): (0.9886517524719238, 0.10697050392627716, 0.3123965263366699, 1.0975452661514282),
    ("token", 1, 12): (1.0245839357376099, 0.18416842818260193, 0.4480534493923187, 1.3197554349899292),
    ("channel", 3, 12): (1.0943704843521118, 0.050409525632858276, 0.1678711622953415, 0.4173774719238281),
    ("channel", 3, 11): (1.076033592224121, 0.040441419929265976, 0.14335636794567108, 0.4109579920768738),
    ("channel", 1, 12): (1.0921874046325684, 0.05991237610578537, 0.184748575091362, 0.41981080174446106),
}


@pytest.fixture
def build(encoder_config):
    def make(*, encoder=encoder_config, num_steps=100, seed=0, **settings):
        torch.manual_seed(0)
        small = {"decoder": DecoderConfig(dim=16, depth=2, heads=2), "update_every": 1}
        return Sdae(
            build_encoder(encoder, image_size=16), SdaeConfig(**(small | settings)), num_steps=num_steps, seed=seed
        )

    return make


def targets_of(method, batch):
    with torch.no_grad():
        return method.targets(batch, 0)


def teacher_of(method):
    return method.teachers["teacher"].module


# ------------------------------------------------------------------------------------------- the authors' numbers


@pytest.mark.parametrize(("axis", "folds", "num_masked"), GOLDEN)
def test_loss__is_the_authors(build, recorded_batch, draw_weights, monkeypatch, axis, folds, num_masked):
    method = build(cosine_axis=axis, folds=folds)
    draw_weights(method.student, 1)
    draw_weights(teacher_of(method), 2)
    batch, noise = recorded_batch(num_masked=num_masked)
    # Theirs deals hidden tokens to folds by the noise that hid them.
    keys = noise.take_along_dim(batch.masked["global"], dim=-1)
    monkeypatch.setattr(torch, "rand", lambda shape, generator: keys.view(shape))
    loss, metrics = method.loss(method.student(batch), targets_of(method, batch), 0)
    loss.backward()
    expected, *gradient_norms = GOLDEN[axis, folds, num_masked]
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["loss_reconstruction"] == loss
    found = dict(method.student.named_parameters())
    for name, norm in zip((PATCHES, MASK_TOKEN, HEAD), gradient_norms, strict=True):
        assert found[name].grad.norm().item() == pytest.approx(norm, rel=1e-4), name


# ---------------------------------------------------------------------------------------------------------- targets


def test_targets__are_standardised_features_of_each_fold(build, make_batch):
    method, batch = build(folds=3), make_batch(num_masked=11)
    targets = targets_of(method, batch)
    assert targets["features"].shape == (8, 3, 3, 32) and targets["places"].shape == (8, 9)
    torch.testing.assert_close(targets["features"].mean(dim=-1), torch.zeros(8, 3, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(targets["features"].var(dim=-1, correction=0), torch.ones(8, 3, 3), rtol=1e-3, atol=0)
    # The second fold of the view's third image, encoded alone.
    place = targets["places"][6, 3:6]
    tokens = batch.masked["global"][1, 2][place]
    with torch.no_grad():
        alone = teacher_of(method)["encoder"](batch.views["global"][1, 2:3], tokens[None])[0, 1:]
    expected = (alone - alone.mean(-1, keepdim=True)) / (alone.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(targets["features"][6, 1], expected, rtol=1e-4, atol=1e-5)


def test_targets__see_nothing_but_their_own_fold(build, make_batch):
    method, batch = build(folds=3), make_batch()
    before = targets_of(method, batch)
    fold = before["places"][0].view(3, 4)[1]
    token = int(batch.masked["global"][0, 0, fold[2]])
    row, column = divmod(token, 4)
    changed = {"global": batch.views["global"].clone()}
    changed["global"][0, 0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 100
    visible = int(batch.visible["global"][0, 0, 0])
    row, column = divmod(visible, 4)
    changed["global"][0, 0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 100
    after = targets_of(method, replace(batch, views=changed))
    differs = (before["features"] - after["features"]).abs().amax(dim=(-1, -2)) > 1e-4
    assert differs.nonzero().tolist() == [[0, 1]]


def test_targets__folds_are_a_function_of_seed_and_position(build, make_batch):
    method, batch = build(), make_batch()
    places = targets_of(method, batch)["places"]
    assert torch.equal(places.sort(dim=-1).values, torch.arange(12).expand(8, -1))
    assert len(places.unique(dim=0)) == 8
    torch.rand(7)
    assert torch.equal(targets_of(method, batch)["places"], places)
    assert not torch.equal(targets_of(method, replace(batch, position=4))["places"], places)
    assert not torch.equal(targets_of(build(seed=1), batch)["places"], places)


def test_targets__folds_are_the_same_on_one_rank_and_on_two(build, make_batch, monkeypatch):
    method, batch = build(), replace(make_batch(batch=6), position=12)
    whole = targets_of(method, batch)["places"].view(2, 6, 12)
    monkeypatch.setattr(draws, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(draws, "rank", lambda rank=rank: rank)
        part = slice(3 * rank, 3 * rank + 3)
        groups = {name: {"global": getattr(batch, name)["global"][:, part]} for name in ("views", "visible", "masked")}
        share = replace(batch, position=12 + 3 * rank, rows=batch.rows[part], labels=batch.labels[part], **groups)
        half = targets_of(method, share)["places"]
        assert torch.equal(half.view(2, 3, 12), whole[:, part])


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_loss__is_zero_where_predictions_are_the_targets(build, make_batch, axis):
    method, batch = build(cosine_axis=axis), make_batch()
    targets = targets_of(method, batch)
    back = targets["places"].argsort(dim=-1)
    features = 2 * targets["features"].flatten(1, 2).take_along_dim(back[..., None], dim=1)
    loss, _ = method.loss({"features": features}, targets, 0)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_loss__trains_every_parameter_and_no_teacher(build, make_batch):
    method, batch = build(), make_batch()
    loss, _ = method.loss(method.student(batch), targets_of(method, batch), 0)
    loss.backward()
    for name, parameter in method.student.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert trained == parameter.requires_grad, name
    assert all(p.grad is None and not p.requires_grad for p in teacher_of(method).parameters())


def test_loss__falls_when_trained(build, make_batch):
    method, batch = build(), make_batch()
    optimizer = torch.optim.AdamW(method.student.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        loss, _ = method.loss(method.student(batch), targets_of(method, batch), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_monitors__tell_a_collapse_of_the_targets(build, make_batch):
    method, batch = build(), make_batch(batch=16)
    outputs, targets = method.student(batch), targets_of(method, batch)
    figures = method.monitors(outputs, targets)
    assert figures.keys() == {"rank_me", "rank_me_teacher"}
    flat = targets | {"features": targets["features"][:1].expand_as(targets["features"])}
    assert method.monitors(outputs, flat)["rank_me_teacher"].item() == pytest.approx(1.0, abs=1e-3)
    assert figures["rank_me_teacher"] > 2


# ---------------------------------------------------------------------------------------------------------- teacher


def test_teacher__is_the_encoder_alone_without_drop_path(build, encoder_config):
    encoder = EncoderConfig(patch=4, dim=32, depth=2, heads=4, drop_path=0.5)
    method = build(encoder=encoder, update_every=7, num_steps=70, momentum=MomentumConfig(start=0.9, end=0.98))
    teacher = method.teachers["teacher"]
    assert teacher.follows == ("encoder.",) and teacher.every == 7
    assert [round(teacher.momentum(step), 4) for step in (0, 35, 70)] == [0.9, 0.94, 0.98]
    assert not teacher.train_mode and not any(module.training for module in teacher.module.modules())


def test_sdae__warns_of_a_teacher_that_never_moves(build, caplog):
    with caplog.at_level(logging.WARNING):
        build(update_every=100, num_steps=100)
        assert not caplog.records
        build(update_every=101, num_steps=100)
    assert "method.sdae.update_every is 101, but the run has 100 steps" in caplog.text


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"num_masked": 0}, r"views\.mask\.ratio hides no token"),
        ({"num_masked": None}, r"views\.mask\.spread"),
        ({"num_masked": 2}, r"views\.mask\.ratio hides 2 tokens, but method\.sdae\.folds is 3"),
        ({"num_local": 2}, r"views\.local\.count is 2"),
        ({"corrupted": True}, r"views\.corruption\.coverage"),
    ],
)
def test_check_views__names_the_field(facts, line):
    with pytest.raises(ValueError, match=line):
        check_method_views(MethodConfig(name="sdae"), ViewFacts(**({"num_views": 1, "num_masked": 3} | facts)))


@pytest.mark.parametrize("name", ["folds", "update_every"])
def test_config__names_the_field(name):
    with pytest.raises(ValueError, match=rf"sdae\.{name} is 0; it must be at least 1"):
        SdaeConfig(**{name: 0})
