"""Every trained parameter is in exactly one group, and the group says how it is treated."""

import pytest

from maestri.engine.config import OptimizerConfig
from maestri.engine.parameter_groups import followers, parameter_groups
from maestri.model.build import MethodConfig, build_method
from maestri.model.encoder import EncoderConfig
from maestri.model.maect_config import MaectConfig
from maestri.model.method import Method
from maestri.model.plmae_config import PlmaeConfig


@pytest.fixture(params=["plmae", "mae", "one_teacher", "maskcluster", "sdae", "dino", "ibot", "mocov3", "msn"])
def method(request: pytest.FixtureRequest) -> Method:
    name = "plmae" if request.param == "one_teacher" else request.param
    plmae = PlmaeConfig(teachers="one" if request.param == "one_teacher" else "two")
    encoder = EncoderConfig(patch=8, dim=16, heads=2, depth=1)
    return build_method(MethodConfig(name=name, plmae=plmae), encoder, image_size=32, num_steps=10, seed=0)


def test_parameter_groups__each_trained_parameter_is_in_exactly_one(method: Method) -> None:
    groups = parameter_groups(method, OptimizerConfig(weight_decay=0.05))
    grouped = [name for group in groups for name in group["names"]]
    trained = [name for name, parameter in method.student.named_parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trained)
    by_name = dict(method.student.named_parameters())
    for group in groups:
        assert all(by_name[name] is parameter for name, parameter in zip(group["names"], group["params"], strict=True))
    assert len({group["name"] for group in groups}) == len(groups)


def test_parameter_groups__a_group_is_followed_as_a_whole(method: Method) -> None:
    for group in parameter_groups(method, OptimizerConfig(weight_decay=0.05)):
        assert len({followers(name, method.teachers) for name in group["names"]}) == 1


def test_parameter_groups__no_decay_on_vectors_tokens_and_prototypes(method: Method) -> None:
    decay = {
        name: group["weight_decay"]
        for group in parameter_groups(method, OptimizerConfig(weight_decay=0.05))
        for name in group["names"]
    }
    by_name = dict(method.student.named_parameters())
    for name, value in decay.items():
        exempt = by_name[name].ndim <= 1 or name.endswith(("cls_token", "pos_embed", "prototypes", "mask_token"))
        assert value == (0.0 if exempt else 0.05), name


def test_parameter_groups__a_teacher_that_follows_nothing_is_refused() -> None:
    encoder = EncoderConfig(patch=8, dim=16, heads=2, depth=1)
    method = build_method(MethodConfig(), encoder, image_size=32, num_steps=10, seed=0)
    next(iter(method.teachers.values())).follows = ("encoder.", "nothing.")
    with pytest.raises(ValueError, match=r"follows 'nothing\.', but the student trains no such parameter"):
        parameter_groups(method, OptimizerConfig(weight_decay=0.05))


def test_parameter_groups__layer_decay_and_the_heads_own_weight_decay(method: Method) -> None:
    optimizer = OptimizerConfig(weight_decay=0.05, head_weight_decay=0.001, layer_decay=0.5)
    by_name = {name: group for group in parameter_groups(method, optimizer) for name in group["names"]}
    behind = next(name for name, group in by_name.items() if not name.startswith("encoder.") and group["weight_decay"])
    assert by_name["encoder.cls_token"]["lr_scale"] == 0.25
    assert by_name["encoder.blocks.0.mlp.fc1.weight"]["lr_scale"] == 0.5
    assert by_name["encoder.norm.weight"]["lr_scale"] == by_name[behind]["lr_scale"] == 1.0
    assert by_name["encoder.blocks.0.mlp.fc1.weight"]["weight_decay"] == 0.05
    assert by_name[behind]["weight_decay"] == 0.001
    assert not by_name[behind]["is_scheduled"]
    assert by_name["encoder.blocks.0.mlp.fc1.weight"]["is_scheduled"]


@pytest.mark.parametrize("stage", ["head", "tune"])
def test_parameter_groups__frozen_parts_are_in_none_and_the_head_has_its_own_rate(stage: str) -> None:
    encoder = EncoderConfig(patch=8, dim=16, heads=2, depth=2)
    maect = MaectConfig(stage=stage, projector_hidden=8, projection=8, predictor_hidden=8, queue_size=8)
    method = build_method(MethodConfig(name="maect", maect=maect), encoder, image_size=32, num_steps=10, seed=0)
    optimizer = OptimizerConfig(weight_decay=0.05, head_weight_decay=1e-5, layer_decay=0.5, head_lr_scale=5.0)
    by_name = {name: group for group in parameter_groups(method, optimizer) for name in group["names"]}
    assert by_name.keys() == {name for name, value in method.student.named_parameters() if value.requires_grad}
    assert by_name["projector.0.weight"]["lr_scale"] == by_name["predictor.1.bias"]["lr_scale"] == 5.0
    assert by_name["projector.0.weight"]["weight_decay"] == 1e-5
    if stage == "tune":
        assert by_name["encoder.blocks.1.mlp.fc1.weight"]["lr_scale"] == 0.5
        assert by_name["encoder.norm.weight"]["lr_scale"] == 1.0
