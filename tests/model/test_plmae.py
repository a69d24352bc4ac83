import copy
import itertools

import pytest
import torch

from maestri.model.assignment import cross_entropy, sinkhorn
from maestri.model.decoder import DecoderConfig
from maestri.model.encoder import build_encoder
from maestri.model.heads import HeadConfig
from maestri.model.levels import LevelConfig
from maestri.model.plmae import Plmae
from maestri.model.plmae_config import PlmaeConfig, ReconstructionConfig
from maestri.model.staged import commit

HEAD = HeadConfig(hidden=16, layers=2, bottleneck=8, prototypes=12)


def level(**settings):
    return LevelConfig(head=HEAD, **settings)


def config(*, reconstruction=None, class_level=None, data_level=None, **settings):
    return PlmaeConfig(
        decoder=DecoderConfig(dim=16, depth=1, heads=2),
        class_level=class_level or level(),
        data_level=data_level or level(),
        reconstruction=ReconstructionConfig(codes=10, head=HEAD, **(reconstruction or {})),
        **settings,
    )


@pytest.fixture
def build(encoder_config):
    def make(**settings):
        torch.manual_seed(0)
        return Plmae(build_encoder(encoder_config, image_size=16), config(**settings), num_steps=100, seed=0)

    return make


def step_of(method, batch, step=0):
    with torch.no_grad():
        targets = method.targets(batch, step)
    outputs = method.student(batch)
    loss, metrics = method.loss(outputs, targets, step)
    return outputs, targets, loss, metrics


SWITCHES = [
    *({"reconstruction": {"target": t, "sees": s}} for t, s in itertools.product(
        ("codebook", "frozen_codebook", "head", "features"), ("all", "masked"))),
    *({"data_positions": p} for p in ("visible", "masked", "both")),
    *({"class_level": level(balance=b, me_max=0.5), "data_level": level(balance=b)} for b in ("centring", "none")),
    {"class_pairs": "same"},
    {"reconstruction": {"code_centre": "position"}},
    {"teachers": "one"},
    {"teachers": "one", "reconstruction": {"target": "head"}},
]  # fmt: skip


@pytest.mark.parametrize("settings", SWITCHES, ids=str)
def test_loss__every_switch_trains_every_parameter_and_no_teacher(build, make_batch, settings):
    method = build(**settings)
    _, _, loss, metrics = step_of(method, make_batch())
    loss.backward()
    assert loss.isfinite()
    assert {"loss_class", "loss_data", "loss_reconstruction"} <= metrics.keys()
    for name, parameter in method.student.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert trained == parameter.requires_grad, name
    for teacher in method.teachers.values():
        assert all(p.grad is None and not p.requires_grad for p in teacher.module.parameters())
        assert not teacher.module.training
    commit(method.state)


def test_loss__is_the_weighted_sum(build, make_batch):
    weights = {"class_level": level(weight=0.5), "data_level": level(weight=2.0), "reconstruction": {"weight": 3.0}}
    _, _, loss, metrics = step_of(build(**weights), make_batch())
    expected = 0.5 * metrics["loss_class"] + 2.0 * metrics["loss_data"] + 3.0 * metrics["loss_reconstruction"]
    torch.testing.assert_close(loss, expected)


def test_loss__class_labels_come_from_the_other_view(build, make_batch):
    method, batch = build(), make_batch()
    outputs, _, _, metrics = step_of(method, batch)
    teacher = method.teachers["labelling_teacher"].module
    with torch.no_grad():
        tokens = teacher["encoder"](batch.views["global"].flatten(0, 1))
        labels = sinkhorn(teacher["class_head"](tokens[:, 0]), temperature=0.04)
    student = outputs["class_scores"]
    first, second = student[:4], student[4:]
    pairs = [cross_entropy(labels[4:], first, temperature=0.1), cross_entropy(labels[:4], second, temperature=0.1)]
    torch.testing.assert_close(metrics["loss_class"], torch.cat(pairs).mean())


def test_targets__data_labels_stand_at_the_positions_the_student_sees(build, make_batch):
    method, batch = build(), make_batch()
    with torch.no_grad():
        targets = method.targets(batch, 0)
        teacher = method.teachers["labelling_teacher"].module
        tokens = teacher["encoder"](batch.views["global"].flatten(0, 1))
    sample, place = 5, 2
    token = int(batch.visible["global"].flatten(0, 1)[sample, place])
    torch.testing.assert_close(targets["data_scores"][sample, place], teacher["data_head"](tokens[sample, 1 + token]))


def test_targets__masked_only_teacher_never_sees_visible_pixels(build, make_batch):
    method, batch = build(reconstruction={"target": "features", "sees": "masked"}), make_batch()
    changed = copy.deepcopy(batch.views["global"])
    visible = batch.visible["global"][0, 0, 0]
    row, column = divmod(int(visible), 4)
    changed[0, 0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] ^= 255
    from dataclasses import replace

    with torch.no_grad():
        before = method.targets(batch, 0)["reconstruction"]
        after = method.targets(replace(batch, views={"global": changed}), 0)["reconstruction"]
    assert torch.equal(before, after)


def test_targets__one_teacher_costs_one_forward(build, make_batch):
    for teachers, expected in (("one", 1), ("two", 2)):
        method, calls = build(teachers=teachers), []
        for teacher in method.teachers.values():
            teacher.module["encoder"].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.no_grad():
            method.targets(make_batch(), 0)
        assert len(calls) == expected


def test_plmae__weight_zero_builds_nothing_for_it(build, make_batch):
    method = build(class_level=level(weight=0.0), data_level=level(weight=0.0))
    assert set(method.teachers) == {"reconstruction_teacher"}
    assert not any(name.startswith(("class_head", "data_head")) for name, _ in method.student.named_parameters())
    assert step_of(method, make_batch())[2].isfinite()
    method = build(reconstruction={"weight": 0.0})
    assert set(method.teachers) == {"labelling_teacher"}
    assert not any(name.startswith("decoder") for name, _ in method.student.named_parameters())
    assert step_of(method, make_batch())[2].isfinite()


def test_teachers__start_as_the_student(build):
    method = build()
    student = method.student.state_dict()
    for teacher in method.teachers.values():
        own = teacher.module.state_dict()
        assert own.keys() == {name for name in student if name.startswith(teacher.follows)}
        assert all(torch.equal(value, student[name]) for name, value in own.items())


def test_monitors__name_every_level_and_role(build, make_batch):
    method = build()
    outputs, targets, _, _ = step_of(method, make_batch())
    figures = method.monitors(outputs, targets)
    assert {f"information_{at}_{who}" for at in ("class", "data") for who in ("student", "teacher")} <= figures.keys()
    assert all(value.isfinite() for value in figures.values())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ReconstructionConfig(codes=1),
        lambda: ReconstructionConfig(code_momentum=1.0),
        lambda: ReconstructionConfig(code_temperature=0.0),
        lambda: config(class_level=level(weight=0.0), data_level=level(weight=0.0), reconstruction={"weight": 0.0}),
    ],
)
def test_plmae_config__rejects(wrong):
    with pytest.raises(ValueError):
        wrong()
