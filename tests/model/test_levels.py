import math

import pytest
import torch

from maestri.model.assignment import cross_entropy, me_max, prototypes_used
from maestri.model.heads import HeadConfig
from maestri.model.levels import (
    LevelConfig,
    MomentumConfig,
    TemperatureConfig,
    cosine_momentum,
    level_loss,
    level_monitors,
    linear_momentum,
    new_assigner,
    other_views,
    teacher_temperature,
)


def test_cosine_momentum__ends_where_it_should():
    momentum = cosine_momentum(MomentumConfig(start=0.9, end=1.0), 100)
    assert momentum(0) == pytest.approx(0.9) and momentum(50) == pytest.approx(0.95) and momentum(100) == 1.0
    assert momentum(1000) == 1.0


def test_linear_momentum__ends_where_it_should():
    momentum = linear_momentum(MomentumConfig(start=0.9, end=1.0), 100)
    assert [momentum(step) for step in (0, 25, 100, 1000)] == pytest.approx([0.9, 0.925, 1.0, 1.0])


def test_teacher_temperature__rises_then_stays():
    settings = TemperatureConfig(teacher_start=0.04, teacher_end=0.08, warmup=0.5)
    values = [teacher_temperature(settings, progress) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert values == pytest.approx([0.04, 0.06, 0.08, 0.08])


def test_level_loss__is_weighted_and_names_its_parts():
    scores, labels = torch.randn(2, 3, 5), torch.randn(2, 3, 5).softmax(-1)
    level = LevelConfig(weight=2.0, me_max=0.5)
    loss, metrics = level_loss("data", level, labels=labels, scores=scores, temperature=0.1)
    entropy = cross_entropy(labels.flatten(0, 1), scores.flatten(0, 1), temperature=0.1).mean()
    spread = me_max(scores.flatten(0, 1), temperature=0.1)
    assert loss == pytest.approx(float(2 * entropy + 0.5 * spread))
    assert metrics == {"loss_data": entropy, "me_max_data": spread}


def test_other_views__mean_of_the_rest():
    labels = torch.rand(3, 4, 5)
    found = other_views(labels.flatten(0, 1), 3).view(3, 4, 5)
    assert torch.allclose(found[1], (labels[0] + labels[2]) / 2)


def test_level_monitors__tell_collapse_from_use():
    apart = torch.eye(8).repeat(4, 1)
    same = torch.eye(8)[:1].repeat(32, 1)
    figures = level_monitors("class", student=apart, teacher=same, temperature=0.1)
    assert figures["used_class_student"] == 1.0 and figures["used_class_teacher"] == pytest.approx(1 / 8)
    assert figures["information_class_student"] > 0.9 and abs(figures["information_class_teacher"]) < 1e-6


def test_prototypes_used__share_of_what_could_be():
    assert prototypes_used(torch.eye(4)[:2].repeat(1, 100)) == 1.0  # two samples, two prototypes


def test_new_assigner__carries_the_settings():
    level = LevelConfig(balance="centring", centre_momentum=0.5, head=HeadConfig(prototypes=6))
    assigner = new_assigner(level)
    assigner.labels(torch.ones(2, 6), temperature=0.1)
    assigner.commit()
    assert torch.equal(assigner.center, torch.full((6,), 0.5))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: LevelConfig(weight=-1.0),
        lambda: LevelConfig(weight=0.0, me_max=1.0),
        lambda: MomentumConfig(start=1.5),
        lambda: TemperatureConfig(student=0.0),
        lambda: TemperatureConfig(warmup=2.0),
    ],
)
def test_level_config__rejects(wrong):
    with pytest.raises(ValueError):
        wrong()


def test_level_monitors__entropy_is_a_share_of_log_k():
    flat = torch.zeros(10, 7)
    figures = level_monitors("class", student=flat, teacher=flat, temperature=0.1)
    assert figures["entropy_class_student"] == pytest.approx(math.log(7) / math.log(7))
