"""MoCo-v3.

Golden values were made by running the authors' code (github.com/facebookresearch/moco-v3, commit
c349e6e24f40d3fedb22d973f92defa4cedf37a7: ``MoCo_ViT`` of ``moco/builder.py`` around ``VisionTransformerMoCo`` of
``vits.py``, timm 0.4.9, ``stop_grad_conv1``, T = 0.2, m = 1) on one gloo rank in torch 2.15, on a CPU, in float32, with
the weights, positions and images that the test makes: the authors' layout of sines and cosines is another.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maestri.engine.config import OptimizerConfig
from maestri.engine.parameter_groups import parameter_groups
from maestri.model.build import MethodConfig, check_views
from maestri.model.encoder import EncoderConfig, build_encoder
from maestri.model.method import ViewFacts
from maestri.model.mocov3 import Mocov3, Mocov3Config
from maestri.pipelines.batch import Batch


@pytest.fixture
def build(encoder_config):
    def make(*, encoder=encoder_config, **settings):
        torch.manual_seed(0)
        config = Mocov3Config(**({"hidden": 24, "projection": 8} | settings))
        method = Mocov3(build_encoder(encoder, image_size=16), config, num_steps=100)
        method.student.train()
        return method

    return make


def step_of(method, batch, step=0):
    with torch.no_grad():
        targets = method.targets(batch, step)
    outputs = method.student(batch)
    loss, metrics = method.loss(outputs, targets, step)
    return outputs, targets, loss, metrics


# ------------------------------------------------------------------------------------------- the authors' numbers

GOLDEN_LOSS = 2.431173324584961
GOLDEN_GRADIENTS = {
    "encoder.blocks.0.attn.qkv.weight": 9.819843292236328,
    "encoder.cls_token": 3.9516806602478027,
    "encoder.norm.weight": 1.1410280466079712,
    "projector.0.weight": 3.8959920406341553,
    "projector.4.weight": 2.052063226699829,
    "predictor.0.weight": 2.0476162433624268,
    "predictor.3.weight": 2.4489059448242188,
}


def test_loss__is_the_authors(build, draw_weights):
    method = build()
    draw_weights(method.student, 0)
    draw_weights(method.teachers["key_teacher"].module, 1)
    pixels = np.random.RandomState(2).randint(0, 256, (2, 6, 3, 16, 16)).astype(np.uint8)
    batch = Batch(
        views={"global": torch.from_numpy(pixels)},
        token_mask={},
        visible={},
        masked={},
        labels=torch.full((6,), -1),
        rows=torch.arange(6),
        position=0,
    )
    _, _, loss, _ = step_of(method, batch)
    loss.backward()
    assert loss.item() == pytest.approx(GOLDEN_LOSS, rel=1e-5)
    found = {name: parameter.grad.norm().item() for name, parameter in method.student.named_parameters()
             if name in GOLDEN_GRADIENTS}  # fmt: skip
    assert found == pytest.approx(GOLDEN_GRADIENTS, rel=1e-4)


# --------------------------------------------------------------------------------------------------- loss and keys


def test_loss__is_two_tau_times_both_directions(build):
    stream = np.random.RandomState(3)
    predicted, keys = stream.standard_normal((2, 2, 5, 8))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    outputs = {"predicted": torch.from_numpy(predicted).float()}
    loss, metrics = build(temperature=0.3).loss(outputs, {"keys": torch.from_numpy(keys).float()}, 0)
    expected, found = 0.0, 0
    for of, other in ((0, 1), (1, 0)):
        for image in range(5):
            query = predicted[of, image] / np.linalg.norm(predicted[of, image])
            logits = [float(query @ key) / 0.3 for key in keys[other]]
            expected += (math.log(sum(map(math.exp, logits))) - logits[image]) / 5
            found += max(range(5), key=logits.__getitem__) == image
    assert loss.item() == pytest.approx(2 * 0.3 * expected, rel=1e-5)
    assert metrics["loss_contrastive"] == loss and metrics["keys_found"].item() == pytest.approx(found / 10)


def test_loss__is_least_where_each_query_is_its_own_key(build):
    method, keys = build(), torch.eye(8)[:4].expand(2, 4, 8)
    own, metrics = method.loss({"predicted": 3 * keys}, {"keys": keys}, 0)
    other, others = method.loss({"predicted": keys.roll(1, dims=1)}, {"keys": keys}, 0)
    assert own < other and metrics["keys_found"] == 1.0 and others["keys_found"] == 0.0


def test_targets__keys_are_the_teachers_unit_vectors_of_whole_views(build, make_batch, draw_weights):
    method, batch = build(), make_batch(num_masked=0)
    teacher = method.teachers["key_teacher"].module
    draw_weights(teacher, 1)
    outputs, targets, _, _ = step_of(method, batch)
    assert outputs["class_token"].shape == (2, 4, 32) and outputs["predicted"].shape == (2, 4, 8)
    assert targets["keys"].shape == (2, 4, 8) and not targets["keys"].requires_grad
    with torch.no_grad():
        for view, keys in zip(batch.views["global"], targets["keys"], strict=True):  # each its own batch to batch norm
            expected = teacher["projector"](teacher["encoder"](view)[None, :, 0])[0]
            torch.testing.assert_close(keys, F.normalize(expected, dim=-1))


# ------------------------------------------------------------------------------------------------------ what trains


@pytest.mark.parametrize("frozen", [True, False])
def test_loss__trains_all_but_a_frozen_patch_embedding_and_no_teacher(build, make_batch, draw_weights, frozen):
    method = build(freeze_patch_embedding=frozen)
    draw_weights(method.teachers["key_teacher"].module, 1)
    _, _, loss, _ = step_of(method, make_batch(num_masked=0))
    loss.backward()
    trained = {name for name, value in method.student.named_parameters() if value.grad is not None and value.grad.any()}
    kept = {"encoder.pos_embed"} | (
        {"encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias"} if frozen else set()
    )
    assert trained == {name for name, _ in method.student.named_parameters()} - kept
    grouped = {name for group in parameter_groups(method, OptimizerConfig()) for name in group["names"]}
    assert grouped == trained
    assert all(p.grad is None and not p.requires_grad for p in method.teachers["key_teacher"].module.parameters())


def test_teacher__starts_as_encoder_and_projector_and_has_no_drop_path(build, make_batch):
    method = build(encoder=EncoderConfig(patch=4, dim=32, depth=2, heads=4, drop_path=0.5))
    teacher, student = method.teachers["key_teacher"], method.student.state_dict()
    own = teacher.module.state_dict()
    assert own.keys() == {name for name in student if name.startswith(("encoder.", "projector."))}
    assert teacher.follows == ("encoder.", "projector.")
    assert all(torch.equal(value, student[name]) for name, value in own.items())
    assert teacher.momentum(0) == pytest.approx(0.99) and teacher.momentum(100) == 1.0
    first, second = (method.targets(make_batch(num_masked=0), 0)["keys"] for _ in range(2))
    assert torch.equal(first, second)


def test_student__last_norms_have_no_parameters_and_linear_layers_no_biases(build):
    student = build().student
    names = [name for part in ("projector", "predictor") for name, _ in student.get_submodule(part).named_parameters()]
    assert names == [*"0.weight 1.weight 1.bias 3.weight 4.weight 4.bias 6.weight".split(),
                     *"0.weight 1.weight 1.bias 3.weight".split()]  # fmt: skip


def test_loss__falls_when_trained_and_keys_are_found(build, make_batch):
    method, batch = build(), make_batch(num_masked=0, batch=16)
    optimizer = torch.optim.AdamW([p for p in method.student.parameters() if p.requires_grad], lr=3e-3)
    rows = []
    for step in range(30):
        _, _, loss, metrics = step_of(method, batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rows.append((loss.item(), metrics["keys_found"].item()))
    assert rows[-1][0] < 0.5 * rows[0][0] and rows[-1][1] > 0.9


def test_monitors__tell_the_rank(build, make_batch):
    method = build()
    outputs, targets, _, _ = step_of(method, make_batch(num_masked=0))
    assert 1 <= method.monitors(outputs, targets)["rank_me"] <= 8


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"num_views": 3}, r"views\.count is 3; method mocov3 compares 2 views"),
        ({"num_masked": 3}, r"views\.mask\.ratio hides tokens"),
        ({"num_masked": None}, r"views\.mask\.ratio hides tokens"),
        ({"num_local": 2}, r"views\.local\.count is 2"),
        ({"corrupted": True}, r"views\.corruption\.coverage"),
    ],
)
def test_check_views__names_the_field(facts, line):
    with pytest.raises(ValueError, match=line):
        check_views(MethodConfig(name="mocov3"), ViewFacts(**({"num_views": 2, "num_masked": 0} | facts)))
    check_views(MethodConfig(name="mocov3"), ViewFacts(num_views=2, num_masked=0))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"temperature": 0.0}, r"mocov3\.temperature is 0\.0; it must be above 0"),
        ({"hidden": 0}, r"mocov3\.hidden is 0"),
        ({"projection": 0}, r"mocov3\.projection is 0"),
    ],
)
def test_config__names_the_field(settings, line):
    with pytest.raises(ValueError, match=line):
        Mocov3Config(**settings)
