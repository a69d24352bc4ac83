import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from maestri.model.build import MethodConfig
from maestri.model.build import check_views as check_method_views
from maestri.model.encoder import EncoderConfig, build_encoder
from maestri.model.heads import HeadConfig
from maestri.model.levels import LevelConfig, cross_view_labels, weighted_mean
from maestri.model.maskcluster import Maskcluster, MaskclusterConfig
from maestri.model.method import ViewFacts
from maestri.model.staged import commit, rollback

HEAD = HeadConfig(hidden=16, layers=2, bottleneck=8, prototypes=12)
BATCH, TOKENS, PATCH = 4, 16, 4


def level(**settings):
    return LevelConfig(head=HEAD, **settings)


@pytest.fixture
def build(encoder_config):
    def make(*, class_level=None, patch_level=None, encoder=encoder_config, **settings):
        torch.manual_seed(0)
        config = MaskclusterConfig(class_level=class_level or level(), patch_level=patch_level or level(), **settings)
        return Maskcluster(build_encoder(encoder, image_size=16), config, num_steps=100)

    return make


@pytest.fixture
def corrupted(make_batch):
    """Batches with corrupted twins, and local views of 8 × 8 where ``num_local`` asks for them."""

    def make(*, views=2, num_local=0, align=True, seed=0):
        batch = make_batch(batch=BATCH, views=views, seed=seed)
        generator = torch.Generator().manual_seed(seed + 1)
        clean = batch.views["global"]
        pixels = torch.rand(clean.shape[:2] + clean.shape[3:], generator=generator) < 0.3
        tokens = pixels.view(views, BATCH, 4, PATCH, 4, PATCH).any(dim=5).any(dim=3).flatten(2)
        if align:
            tokens = torch.rand((views, BATCH, TOKENS), generator=generator) < 0.5
            pixels = tokens.view(views, BATCH, 4, 1, 4, 1).expand(-1, -1, -1, PATCH, -1, PATCH).reshape(pixels.shape)
        found = {"global": clean, "global_corrupted": clean * ~pixels[:, :, None]}
        if num_local:
            shape = (num_local, BATCH, 3, 8, 8)
            found["local"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return replace(
            batch,
            views=found,
            token_mask={"global": tokens},
            pixel_mask={} if align else {"global": pixels},
            visible={},
            masked={},
        )

    return make


def step_of(method, batch, step=0):
    with torch.no_grad():
        targets = method.targets(batch, step)
    outputs = method.student(batch)
    loss, metrics = method.loss(outputs, targets, step)
    return outputs, targets, loss, metrics


SWITCHES = [
    *({"class_level": level(balance=a, me_max=0.5), "patch_level": level(balance=b)} for a, b in itertools.product(
        ("sinkhorn", "centring", "none"), repeat=2)),
    {"class_level": level(sinkhorn_start="probabilities"), "patch_level": level(me_max=1.0)},
    {"patch_positions": "corrupted"},
]  # fmt: skip


@pytest.mark.parametrize(("num_local", "align"), [(0, True), (3, False)])
@pytest.mark.parametrize("settings", SWITCHES, ids=str)
def test_loss__every_switch_trains_every_parameter_and_no_teacher(build, corrupted, settings, num_local, align):
    method = build(**settings)
    _, _, loss, metrics = step_of(method, corrupted(num_local=num_local, align=align))
    loss.backward()
    assert loss.isfinite()
    assert {"loss_class", "loss_patch", "loss_reconstruction"} <= metrics.keys()
    for name, parameter in method.student.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert trained == parameter.requires_grad, name
    teacher = method.teachers["teacher"].module
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    commit(method.state)


def test_student__shapes(build, corrupted):
    outputs, targets, _, _ = step_of(build(), corrupted(views=3, num_local=2))
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "class_token": (3 * BATCH, 32),
        "class_scores": (5 * BATCH, 12),
        "patch_scores": (3 * BATCH, TOKENS, 12),
        "pixels": (3 * BATCH, TOKENS, 3 * PATCH**2),
    }
    assert targets["class_labels"].shape == (5 * BATCH, 12) and targets["class_scores"].shape == (3 * BATCH, 12)
    assert targets["patch_labels"].shape == (3 * BATCH, TOKENS, 12)
    assert targets["pixels"].shape == (3 * BATCH, TOKENS, 3 * PATCH**2)


# ------------------------------------------------------------------------------------- against a slow reference


def softmax(scores, temperature):
    sharp = np.exp((scores - scores.max()) / temperature)
    return sharp / sharp.sum()


def entropy_of(labels, scores):
    return -sum(p * math.log(q) for p, q in zip(labels, softmax(scores, 0.1), strict=True))


def balanced(scores):
    """Sinkhorn as published, in turn on prototypes and samples: ``sample proto``."""
    q = np.exp(scores / 0.04)
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(axis=0, keepdims=True) * q.shape[1]
        q /= q.sum(axis=1, keepdims=True) * q.shape[0]
    return q * len(q)


def slow_loss(batch, outputs, teacher, *, num_local, only_corrupted):
    """Class, patch and pixel losses and ME-MAX of the class level, pair by pair and pixel by pixel."""
    num_views = len(batch.views["global"])
    with torch.no_grad():
        tokens = teacher["encoder"](batch.views["global"].flatten(0, 1))
        class_labels = balanced(teacher["class_head"](tokens[:, 0]).double().numpy()).reshape(num_views, BATCH, -1)
        patch_scores = teacher["patch_head"](tokens[:, 1:]).double().numpy()
    patch_labels = balanced(patch_scores.reshape(-1, 12)).reshape(num_views, BATCH, TOKENS, 12)
    student = {name: value.detach().double().numpy() for name, value in outputs.items()}
    class_scores = student["class_scores"].reshape(num_views + num_local, BATCH, 12)

    pairs = [
        entropy_of(class_labels[u, b], class_scores[v, b])
        for u in range(num_views)
        for v in range(num_views + num_local)
        if u != v
        for b in range(BATCH)
    ]
    mean = np.mean([softmax(scores, 0.1) for scores in class_scores.reshape(-1, 12)], axis=0)
    spread = math.log(12) + sum(p * math.log(p) for p in mean)

    patches, errors = [], []
    mean_colour, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    scores = student["patch_scores"].reshape(num_views, BATCH, TOKENS, 12)
    pixels = student["pixels"].reshape(num_views, BATCH, TOKENS, 3, PATCH, PATCH)
    for view, b, token in itertools.product(range(num_views), range(BATCH), range(TOKENS)):
        hit = bool(batch.token_mask["global"][view, b, token])
        if hit or not only_corrupted:
            patches.append(entropy_of(patch_labels[view, b, token], scores[view, b, token]))
        for row, column in itertools.product(range(PATCH), range(PATCH)):
            y, x = token // 4 * PATCH + row, token % 4 * PATCH + column
            if bool(batch.pixel_mask["global"][view, b, y, x]) if batch.pixel_mask else hit:
                for channel in range(3):
                    level_ = int(batch.views["global"][view, b, channel, y, x]) / 255
                    wanted = (level_ - mean_colour[channel]) / deviation[channel]
                    errors.append(abs(pixels[view, b, token, channel, row, column] - wanted))
    return {
        "loss_class": np.mean(pairs),
        "me_max_class": spread,
        "loss_patch": np.mean(patches),
        "loss_reconstruction": np.mean(errors),
    }


@pytest.mark.parametrize(
    ("views", "num_local", "align", "positions"),
    [(2, 0, True, "all"), (3, 2, False, "corrupted"), (1, 2, False, "all"), (2, 3, True, "corrupted")],
)
def test_loss__equals_a_slow_reference(build, corrupted, views, num_local, align, positions):
    method = build(
        class_level=level(weight=0.5, me_max=0.7),
        patch_level=level(weight=2.0),
        patch_positions=positions,
        reconstruction_weight=3.0,
    )
    teacher = method.teachers["teacher"].module
    # Scores of an untrained network hardly differ from one another; these do.
    for head in (method.student.class_head, method.student.patch_head, teacher["class_head"], teacher["patch_head"]):
        for module in head.mlp[::2]:
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    batch = corrupted(views=views, num_local=num_local, align=align)
    outputs, _, loss, metrics = step_of(method, batch)
    expected = slow_loss(batch, outputs, teacher, num_local=num_local, only_corrupted=positions == "corrupted")
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected, rel=1e-4)
    total = 0.5 * expected["loss_class"] + 0.7 * expected["me_max_class"]
    total += 2.0 * expected["loss_patch"] + 3.0 * expected["loss_reconstruction"]
    assert loss.item() == pytest.approx(total, rel=1e-4)


# ---------------------------------------------------------------------------------------- what meets what, and what not


@pytest.mark.parametrize(("num_views", "num_local"), [(2, 0), (2, 3), (3, 1), (1, 2)])
def test_cross_view_labels__never_a_view_with_itself_and_every_other_pair_alike(num_views, num_local):
    marks = torch.eye(num_views).repeat_interleave(BATCH, dim=0)  # a label tells its view
    labels, weights = cross_view_labels(marks, num_views=num_views, num_local=num_local)
    share = (labels * weights[:, None] / weights.sum()).view(num_views + num_local, BATCH, num_views).sum(dim=1)
    expected = torch.ones(num_views + num_local, num_views)
    expected[:num_views].fill_diagonal_(0)
    torch.testing.assert_close(share, expected / expected.sum())


def test_weighted_mean__is_the_mean_where_the_weights_are_one():
    values, weights = torch.tensor([1.0, 5.0, 9.0]), torch.tensor([1.0, 0.0, 1.0])
    assert weighted_mean(values, weights) == 5.0
    assert weighted_mean(values, torch.zeros(3)) == 0.0


@pytest.mark.parametrize("align", [True, False])
def test_loss__reconstruction_is_of_corrupted_pixels_alone(build, corrupted, align):
    method, batch = build(), corrupted(align=align)
    outputs, targets, _, metrics = step_of(method, batch)
    hit = targets["pixel_weights"].bool()
    if align:
        assert torch.equal(hit.all(dim=-1), batch.token_mask["global"].flatten(0, 1))
        assert torch.equal(hit.any(dim=-1), hit.all(dim=-1))
    else:
        assert int(hit.sum()) == int(batch.pixel_mask["global"].sum())
    by_channel = hit[:, :, None].expand(-1, -1, 3, -1).flatten(2)
    for where, changes in ((~by_channel, False), (by_channel, True)):
        moved = outputs | {"pixels": outputs["pixels"] + 10.0 * where}
        found = method.loss(moved, targets, 0)[1]["loss_reconstruction"]
        assert torch.equal(found, metrics["loss_reconstruction"]) != changes


def test_loss__local_views_reach_the_class_loss_alone(build, corrupted):
    method, batch = build(), corrupted(num_local=2)
    before = step_of(method, batch)[3]
    other = replace(batch, views={**batch.views, "local": 255 - batch.views["local"]})
    after = step_of(method, other)[3]
    assert before["loss_class"] != after["loss_class"]
    assert before["loss_patch"] == after["loss_patch"]
    assert before["loss_reconstruction"] == after["loss_reconstruction"]


def test_student__never_sees_the_clean_views_nor_the_teacher_the_corrupted(build, corrupted):
    method, batch = build(), corrupted()
    with torch.no_grad():
        outputs, targets = method.student(batch), method.targets(batch, 0)
        for name, same in (("global", outputs), ("global_corrupted", targets)):
            other = replace(batch, views={**batch.views, name: 255 - batch.views[name]})
            found = method.student(other) if name == "global" else method.targets(other, 0)
            assert all(torch.equal(value, found[key]) for key, value in same.items()), name


def test_teacher__has_no_drop_path(build, corrupted):
    method = build(encoder=EncoderConfig(patch=4, dim=32, depth=2, heads=4, drop_path=0.5))
    method.student.train()
    batch = corrupted()
    with torch.no_grad():
        first, second = (method.targets(batch, 0)["class_scores"] for _ in range(2))
        student = [method.student(batch)["class_scores"] for _ in range(2)]
    assert torch.equal(first, second) and not torch.equal(*student)
    assert not any(module.training for module in method.teachers["teacher"].module.modules())


def test_teacher__starts_as_the_student(build):
    method = build()
    teacher, student = method.teachers["teacher"], method.student.state_dict()
    own = teacher.module.state_dict()
    assert own.keys() == {name for name in student if name.startswith(teacher.follows)}
    assert all(torch.equal(value, student[name]) for name, value in own.items())
    assert "pixel_head." not in teacher.follows
    assert teacher.momentum(0) == pytest.approx(0.996) and teacher.momentum(100) == 1.0


def test_commit__moves_the_centres_of_both_levels_and_rollback_does_not(build, corrupted):
    method = build(class_level=level(balance="centring"), patch_level=level(balance="centring"))
    for act, moves in ((rollback, False), (commit, True)):
        step_of(method, corrupted())
        act(method.state)
        centres = [method.state[f"{name}_level"].center for name in ("class", "patch")]
        assert all(bool(centre.abs().sum() > 0) == moves for centre in centres)


def test_maskcluster__weight_zero_builds_nothing_for_it(build, corrupted):
    method = build(class_level=level(weight=0.0), patch_level=level(weight=0.0))
    assert not method.teachers and not list(method.state.children())
    assert {name.split(".")[0] for name, _ in method.student.named_parameters()} == {"encoder", "pixel_head"}
    assert step_of(method, corrupted())[2].isfinite()
    method = build(reconstruction_weight=0.0, patch_level=level(weight=0.0))
    assert {name.split(".")[0] for name, _ in method.student.named_parameters()} == {"encoder", "class_head"}
    assert step_of(method, corrupted())[3].keys() == {"loss_class"}


def test_monitors__name_every_level_and_role(build, corrupted):
    method = build()
    outputs, targets, _, _ = step_of(method, corrupted(num_local=1))
    figures = method.monitors(outputs, targets)
    assert {f"information_{at}_{who}" for at in ("class", "patch") for who in ("student", "teacher")} <= figures.keys()
    assert "rank_me" in figures and all(value.isfinite() for value in figures.values())


def test_loss__falls_when_trained(build, corrupted):
    method, batch = build(), corrupted(num_local=1)
    optimizer = torch.optim.AdamW(method.student.parameters(), lr=3e-3)
    losses = []
    for step in range(20):
        loss = step_of(method, batch, step)[2]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# ------------------------------------------------------------------------------------------------------- refusals

CLASSLESS = MaskclusterConfig(class_level=level(weight=0.0))


@pytest.mark.parametrize(
    ("config", "facts", "fields"),
    [
        (MaskclusterConfig(), {"corrupted": False}, ["views.corruption.coverage is 0", "maskcluster"]),
        (
            MaskclusterConfig(),
            {"num_views": 1},
            ["views.count is 1", "views.local.count is 0", "method.maskcluster.class_level"],
        ),
        (CLASSLESS, {"num_local": 2}, ["views.local.count is 2", "method.maskcluster.class_level.weight is 0"]),
    ],
)
def test_check_views__names_the_fields(config, facts, fields):
    with pytest.raises(ValueError) as caught:
        check_method_views(
            MethodConfig(name="maskcluster", maskcluster=config),
            ViewFacts(**({"num_views": 2, "corrupted": True} | facts)),
        )
    assert all(name in str(caught.value) for name in fields)


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        (MaskclusterConfig(), {"num_masked": None}),  # views.mask is not looked at
        (MaskclusterConfig(), {"num_masked": 0, "aligned": False}),
        (MaskclusterConfig(), {"num_views": 1, "num_local": 1}),
        (CLASSLESS, {"num_views": 1}),
    ],
)
def test_check_views__enough(config, facts):
    check_method_views(
        MethodConfig(name="maskcluster", maskcluster=config),
        ViewFacts(**({"num_views": 2, "corrupted": True} | facts)),
    )


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"reconstruction_weight": -1.0}, "maskcluster.reconstruction_weight is -1.0"),
        (
            {"class_level": level(weight=0.0), "patch_level": level(weight=0.0), "reconstruction_weight": 0.0},
            r"class_level\.weight, patch_level\.weight and reconstruction_weight",
        ),
    ],
)
def test_maskcluster_config__rejects(settings, field):
    with pytest.raises(ValueError, match=field):
        MaskclusterConfig(**settings)
