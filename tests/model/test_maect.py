"""MAE-CT.

Golden values were made by running the authors' code (github.com/ml-jku/MAE-CT, commit 6c82cb6, February 2024:
``NnclrHead`` and ``NnclrEmaQueueHead`` in ``models/contrastive_heads``, ``losses/nnclr_loss.py``) on sines of a running
number in torch 2.15, on a CPU, in float32.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from maestri.model.build import MethodConfig, check_views
from maestri.model.encoder import EncoderConfig, build_encoder
from maestri.model.maect import Maect, MaectStudent
from maestri.model.maect_config import MaectConfig
from maestri.model.method import ViewFacts
from maestri.model.staged import commit, rollback

DEPTH = 4
PROGRAM = Path(__file__).parent / "maect_ranks_program.py"


def config(stage="tune", **settings):
    small = {"projector_hidden": 24, "projection": 8, "predictor_hidden": 16, "queue_size": 16}
    return MaectConfig(stage=stage, **(small | settings))


@pytest.fixture
def build():
    def make(stage="tune", *, drop_path=0.0, position="sincos", seed=0, **settings):
        torch.manual_seed(0)
        encoder = EncoderConfig(patch=4, dim=32, depth=DEPTH, heads=4, drop_path=drop_path, position=position)
        method = Maect(build_encoder(encoder, image_size=16), config(stage, **settings), seed=seed)
        for teacher in method.teachers.values():
            teacher.module.train(teacher.train_mode)
        method.student.train()
        return method

    return make


def step_of(method, batch, step=0):
    with torch.no_grad():
        targets = method.targets(batch, step)
    outputs = method.student(batch)
    loss, metrics = method.loss(outputs, targets, step)
    return outputs, targets, loss, metrics


def waves(*shape, step, start):
    """Returns sines of a running number: inputs that need no file."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * step + start).view(shape).float()


# ------------------------------------------------------------------------------------------- the authors' numbers


def test_loss__is_the_authors(build):
    method = build("head", projection=6, queue_size=12)
    method.queue.entries.copy_(F.normalize(waves(12, 6, step=1.7, start=0.3), dim=-1))
    method.queue.rows.copy_(torch.arange(12) % 6)
    predicted = waves(2, 4, 6, step=1.3, start=0.7).requires_grad_(True)
    outputs = {"projected": waves(2, 4, 6, step=0.9, start=0.1), "predicted": predicted}
    rows = torch.tensor([3, 4, 40, 41])
    targets = {"rows": rows, "labels": rows, "draws": torch.zeros(2, 4, dtype=torch.int64)}
    loss, metrics = method.loss(outputs, targets, 0)
    loss.backward()
    assert loss.item() == pytest.approx(5.426630020141602, rel=1e-5)
    assert metrics["loss_contrastive"] == loss
    gradient = [-0.2816948890686035, 0.10846325755119324, 0.03828231990337372]
    gradient += [-0.08094951510429382, 0.21803778409957886, 0.1133556216955185]
    torch.testing.assert_close(predicted.grad[0, 0], torch.tensor(gradient), rtol=1e-5, atol=1e-6)
    assert predicted.grad.norm().item() == pytest.approx(1.1914598941802979, rel=1e-5)


def test_student__projector_and_predictor_are_the_authors():
    encoder = build_encoder(EncoderConfig(patch=4, dim=8, depth=1, heads=2), image_size=8)
    encoder.embed_dim = 5  # of the heads' input here
    student = MaectStudent(encoder, config("head", projector_hidden=7, projection=6, predictor_hidden=9))
    with torch.no_grad():
        heads = [*student.projector.parameters(), *student.predictor.parameters()]
        for index, parameter in enumerate(heads):
            parameter.copy_(waves(*parameter.shape, step=0.37 + 0.11 * index, start=0.2 * index))
        predicted = student.predictor(student.projector(waves(2, 4, 5, step=0.61, start=0.4)))
    first = [1.8882371187210083, -2.400831460952759, 2.3302981853485107]
    second = [0.895578145980835, -1.80525803565979, 2.2764663696289062]
    torch.testing.assert_close(predicted[:, 1, :3], torch.tensor([first, second]), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ what trains


def frozen_names(method):
    return {name for name, parameter in method.student.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("position", ["sincos", "learned"])
def test_student__head_stage_freezes_the_encoder_and_nothing_else(build, position):
    method = build("head", position=position)
    names = [name for name, _ in method.student.named_parameters()]
    assert frozen_names(method) == {name for name in names if name.startswith("encoder.")}
    assert method.inherits == ("encoder.",) and not method.teachers


@pytest.mark.parametrize("frozen_blocks", [None, 0, 1, DEPTH])
def test_student__tuning_freezes_the_stem_and_the_lower_blocks(build, frozen_blocks):
    method = build(frozen_blocks=frozen_blocks, position="learned")
    count = DEPTH // 2 if frozen_blocks is None else frozen_blocks
    prefixes = tuple(f"encoder.blocks.{index}." for index in range(count))
    prefixes += ("encoder.patch_embed.", "encoder.cls_token", "encoder.pos_embed") * (count > 0)
    expected = {name for name, _ in method.student.named_parameters() if prefixes and name.startswith(prefixes)}
    assert frozen_names(method) == expected
    assert method.inherits == ("encoder.", "projector.", "predictor.", "queue.")


@pytest.mark.parametrize("stage", ["head", "tune"])
def test_loss__trains_what_is_not_frozen_and_no_teacher(build, make_batch, stage):
    method = build(stage)
    before = {name: value.clone() for name, value in method.student.named_parameters()}
    optimizer = torch.optim.SGD([p for p in method.student.parameters() if p.requires_grad], lr=0.1)
    _, _, loss, _ = step_of(method, make_batch(num_masked=0))
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    for name, parameter in method.student.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert trained == parameter.requires_grad, name
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name
    for teacher in method.teachers.values():
        assert all(p.grad is None and not p.requires_grad for p in teacher.module.parameters())


@pytest.mark.parametrize(("stage", "first_trained"), [("head", DEPTH), ("tune", DEPTH // 2)])
def test_student__keeps_nothing_for_backward_below_what_trains(build, make_batch, stage, first_trained):
    method = build(stage)
    found = []
    for block in method.student.encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: found.append(output.requires_grad))
    method.student(make_batch(num_masked=0))
    assert found == [index >= first_trained for index in range(DEPTH)]


@pytest.mark.parametrize("stage", ["head", "tune"])
def test_train__leaves_frozen_parts_in_eval_mode(build, stage):
    student = build(stage, drop_path=0.5).student
    student.eval()
    student.train()
    count = DEPTH if stage == "head" else DEPTH // 2
    for index, block in enumerate(student.encoder.blocks):
        assert all(module.training == (index >= count) for module in block.modules())
    assert not student.encoder.patch_embed.training
    assert student.projector.training and student.predictor.training


# --------------------------------------------------------------------------------------------------------- teachers


def test_teachers__are_the_projector_alone_and_the_encoder_alone(build):
    teachers = build(projector_momentum=0.9, encoder_momentum=0.99).teachers
    projection, encoder = teachers["projection_teacher"], teachers["encoder_average"]
    assert projection.follows == ("projector.",) and projection.momentum(5) == 0.9
    assert all(module.training for module in projection.module.modules())
    assert encoder.follows == ("encoder.",) and encoder.momentum(5) == 0.99
    assert not any(module.training for module in encoder.module.modules())
    assert not hasattr(projection.module, "encoder")


def test_loss__looks_up_and_queues_what_the_projection_teacher_makes_of_the_students_tokens(build, make_batch):
    method, batch = build(), make_batch(num_masked=0)
    teacher = method.teachers["projection_teacher"].module["projector"]
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.3)
    outputs, _, _, _ = step_of(method, batch)
    with torch.no_grad():
        expected = F.normalize(teacher(outputs["pooled"]), dim=-1)
    assert not torch.allclose(expected, F.normalize(outputs["projected"], dim=-1), atol=0.1)
    commit(method.state)
    torch.testing.assert_close(method.queue.entries[:4], expected[0].detach())


# ------------------------------------------------------------------------------------------------- look-up and queue


def test_commit__view_0_alone_is_queued_after_the_look_up(build, make_batch):
    method, batch = build("head"), make_batch(num_masked=0)
    start = method.queue.entries.clone()
    outputs, _, first, _ = step_of(method, batch)
    assert torch.equal(method.queue.entries, start)  # staged, not written
    rollback(method.state)
    _, _, again, _ = step_of(method, batch)
    assert torch.equal(first, again)
    commit(method.state)
    torch.testing.assert_close(method.queue.entries[:4], F.normalize(outputs["projected"][0].detach(), dim=-1))
    assert torch.equal(method.queue.entries[4:], start[4:])
    assert method.queue.rows[:4].tolist() == batch.rows.tolist() and method.queue.pointer == 4


def test_targets__draws_are_a_function_of_seed_and_position(build, make_batch):
    method, batch = build(top_k=8), make_batch(num_masked=0, batch=64)
    first = method.targets(batch, 0)["draws"]
    torch.rand(7)
    assert torch.equal(method.targets(batch, 3)["draws"], first)
    assert not torch.equal(method.targets(replace(batch, position=64), 0)["draws"], first)
    assert not torch.equal(build(top_k=8, seed=1).targets(batch, 0)["draws"], first)
    assert first.unique().tolist() == list(range(8))  # 128 draws of 8: each misses with probability 4e-8
    assert first.shape == (2, 64)


def test_targets__the_nearest_is_taken_with_top_k_1(build, make_batch):
    assert not build("head").targets(make_batch(num_masked=0), 0)["draws"].any()


def test_monitors__agreement_leaves_unknown_labels_out(build, make_batch):
    method, batch = build("head"), make_batch(num_masked=0)
    outputs, targets, _, _ = step_of(method, batch)
    assert method.monitors(outputs, targets).keys() == {"rank_me"}  # nobody has a label
    labels = torch.tensor([0, 1, -1, 1])
    method.queue.entries[:4] = F.normalize(outputs["projected"][0].detach(), dim=-1).roll(1, dims=0)
    method.queue.labels[:4] = torch.tensor([0, 0, 5, 5])
    outputs = outputs | {"projected": outputs["projected"][:1].expand(2, -1, -1)}
    figures = method.monitors(outputs, targets | {"labels": labels})
    # What samples 0, 1 and 3 find, as entry i + 1 is the projection of sample i: labels 0, 5 and, at the front, 0.
    assert figures["neighbour_agreement"].item() == pytest.approx(1 / 3)


def test_pooling__mean_patch_or_class_token(build, make_batch):
    batch = make_batch(num_masked=0)
    for pooling in ("mean", "cls"):
        student = build(pooling=pooling).student.eval()
        with torch.no_grad():
            tokens = student.encoder(batch.views["global"].flatten(0, 1))
            pooled = student(batch)["pooled"].flatten(0, 1)
        torch.testing.assert_close(pooled, tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(dim=1))


# ------------------------------------------------------------------------------------------------------------ ranks


@pytest.fixture(scope="module")
def results(on_one_and_two_ranks):
    return on_one_and_two_ranks(PROGRAM)


@pytest.mark.parametrize("stage", ["head", "tune"])
def test_two_ranks__have_the_losses_gradients_and_queue_of_one(results, stage):
    one, two = results[0][stage], [each[stage] for each in results[1]]
    assert one.keys() == two[0].keys() == two[1].keys()
    assert any(name.startswith("gradient of encoder.") for name in one) == (stage == "tune")
    assert one["queue rows"].tolist() == [*range(8), *range(8)]
    largest = max(float(value.abs().max()) for name, value in one.items() if name.startswith("gradient"))
    for name, expected in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        if expected.is_floating_point():
            # float32: sums in another order, 6e-8 each, through some layers and batch norms.  What a batch norm takes
            # off again, as a shift of its input, has no gradient but such rounding: hence the scale of the largest.
            scale = largest if name.startswith("gradient") else float(expected.abs().max())
            difference = float((two[0][name] - expected).abs().max())
            assert difference <= 2e-6 * scale, f"{name}: {difference} at a scale of {scale}"
        else:
            assert torch.equal(two[0][name], expected), name


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"num_views": 3}, r"views\.count is 3; method maect compares 2 views"),
        ({"num_masked": 3}, r"views\.mask\.ratio hides tokens"),
        ({"num_masked": None}, r"views\.mask\.ratio hides tokens"),
        ({"num_local": 2}, r"views\.local\.count is 2"),
        ({"corrupted": True}, r"views\.corruption\.coverage"),
        ({"micro_size": 1000}, r"queue_size is 65536; it must be a multiple of .* \(1000: batch\.global_size"),
    ],
)
def test_check_views__names_the_field(facts, line):
    with pytest.raises(ValueError, match=line):
        check_views(MethodConfig(name="maect"), ViewFacts(**({"num_views": 2, "num_masked": 0} | facts)))
    check_views(MethodConfig(name="maect"), ViewFacts(num_views=2, num_masked=0, micro_size=1024))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"temperature": 0.0}, r"maect\.temperature is 0\.0; it must be above 0"),
        ({"queue_size": 0}, r"maect\.queue_size is 0"),
        ({"top_k": 17}, r"maect\.top_k is 17; the queue holds only 16 entries"),
        ({"projector_momentum": 1.5}, r"maect\.projector_momentum is 1\.5"),
        ({"frozen_blocks": -1}, r"maect\.frozen_blocks is -1"),
        ({"stage": "head", "frozen_blocks": 1}, r"frozen_blocks is set, but stage: head"),
    ],
)
def test_config__names_the_field(settings, line):
    with pytest.raises(ValueError, match=line):
        config(**settings)


def test_maect__more_frozen_blocks_than_there_are(build):
    with pytest.raises(ValueError, match=r"frozen_blocks is 5; the encoder has only 4 blocks"):
        build(frozen_blocks=5)
