from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maestri.engine.config import OptimizerConfig
from maestri.engine.parameter_groups import parameter_groups
from maestri.model.build import MethodConfig
from maestri.model.build import check_views as check_method_views
from maestri.model.encoder import EncoderConfig, build_encoder
from maestri.model.heads import HeadConfig
from maestri.model.ibot import Ibot, IbotConfig
from maestri.model.levels import LevelConfig, TemperatureConfig
from maestri.model.method import ViewFacts
from maestri.model.staged import commit, rollback

HEAD = HeadConfig(hidden=24, layers=3, bottleneck=8, prototypes=16)
OTHER_HEAD = HeadConfig(hidden=16, layers=2, bottleneck=8, prototypes=12)
BATCH, TOKENS = 4, 16


def level(**settings):
    return LevelConfig(**({"head": HEAD, "balance": "centring"} | settings))


@pytest.fixture
def build(encoder_config):
    def make(**settings):
        torch.manual_seed(0)
        config = IbotConfig(**({"class_level": level(), "patch_level": level()} | settings))
        return Ibot(build_encoder(encoder_config, image_size=16), config, num_steps=100)

    return make


@pytest.fixture
def masked(make_batch):
    """Batches whose views hide different numbers of tokens, the first image's none; local views of 8 × 8."""

    def make(*, views=2, num_local=3, seed=0):
        batch = make_batch(batch=BATCH, views=views, seed=seed)
        generator = torch.Generator().manual_seed(seed + 1)
        hidden = torch.rand((views, BATCH, TOKENS), generator=generator) < torch.tensor([0, 0.2, 0.4, 0.6])[:, None]
        local = torch.randint(0, 256, (num_local, BATCH, 3, 8, 8), dtype=torch.uint8, generator=generator)
        found = {**batch.views, "local": local} if num_local else batch.views
        return replace(batch, views=found, token_mask={"global": hidden}, visible={}, masked={})

    return make


def step_of(method, batch, step=0):
    with torch.no_grad():
        targets = method.targets(batch, step)
    outputs = method.student(batch)
    loss, metrics = method.loss(outputs, targets, step)
    return outputs, targets, loss, metrics


SWITCHES = [
    {},
    {"class_level": level(balance="sinkhorn", me_max=0.5), "patch_level": level(balance="none", me_max=0.5)},
    {"class_level": level(balance="none"), "patch_level": level(balance="sinkhorn")},
    {"shared_head": False, "patch_level": level(head=OTHER_HEAD)},
]


@pytest.mark.parametrize("num_local", [0, 3])
@pytest.mark.parametrize("settings", SWITCHES, ids=str)
def test_loss__every_switch_trains_every_parameter_and_no_teacher(build, masked, settings, num_local):
    method = build(**settings)
    _, _, loss, metrics = step_of(method, masked(num_local=num_local))
    loss.backward()
    assert loss.isfinite() and {"loss_class", "loss_patch"} <= metrics.keys()
    for name, parameter in method.student.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert trained == parameter.requires_grad, name
    teacher = method.teachers["teacher"].module
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(("shared_head", "other"), [(True, HEAD), (False, OTHER_HEAD)])
def test_student__shapes(build, masked, shared_head, other):
    method = build(shared_head=shared_head, patch_level=level(head=other))
    outputs, targets, _, _ = step_of(method, masked(views=3, num_local=2))
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "class_token": (3 * BATCH, 32),
        "class_scores": (5 * BATCH, 16),
        "patch_scores": (3 * BATCH, TOKENS, other.prototypes),
    }
    assert targets["class_labels"].shape == (5 * BATCH, 16) and targets["class_scores"].shape == (3 * BATCH, 16)
    assert targets["patch_labels"].shape == outputs["patch_scores"].shape
    assert list(method.student.heads) == (["shared"] if shared_head else ["class", "patch"])


# ------------------------------------------------------------------------------------- against a slow reference


def test_loss__patches_are_averaged_in_their_view_and_then_over_all_views(build, masked):
    """Scores and labels made by hand; hidden patch by hidden patch, in float64."""
    method = build(
        class_level=level(weight=2.0), patch_level=level(weight=0.5), patch_temperature=TemperatureConfig(student=0.2)
    )
    batch = masked()
    outputs, targets, _, _ = step_of(method, batch)
    stream = np.random.RandomState(0)
    labels = stream.dirichlet(np.ones(16), (2 * BATCH, TOKENS))
    scores = stream.uniform(-1, 1, (2 * BATCH, TOKENS, 16))
    hidden = batch.token_mask["global"].flatten(0, 1).numpy()
    by_view = []
    for view in range(2 * BATCH):
        logs = [scores[view, i] / 0.2 - np.log(np.exp(scores[view, i] / 0.2).sum()) for i in range(TOKENS)]
        of_patches = [-(labels[view, i] * logs[i]).sum() for i in range(TOKENS) if hidden[view, i]]
        by_view.append(np.mean(of_patches) if of_patches else 0.0)
    assert by_view[0] == by_view[BATCH] == 0.0 < by_view[1]
    outputs = outputs | {"patch_scores": torch.from_numpy(scores).float()}
    targets = targets | {"patch_labels": torch.from_numpy(labels).float()}
    loss, metrics = method.loss(outputs, targets, 0)
    assert float(metrics["loss_patch"]) == pytest.approx(np.mean(by_view), rel=1e-5)
    assert loss.item() == pytest.approx(2 * float(metrics["loss_class"]) + 0.5 * np.mean(by_view), rel=1e-5)


RECORDED = {
    # side and number of local views, whether all patches have one position:
    # losses, centres after the update, norms of gradients
    (16, 2, False): (
        {"loss": 11.177020072937012, "loss_class": 8.134872436523438, "loss_patch": 3.042147636413574 / 0.7},
        [-0.20808808505535126, -0.334585577249527, -0.23331473767757416, 0.16045276820659637]
        + [0.22494202852249146, -0.09292160719633102, 0.2955673635005951, -0.19629457592964172]
        + [-0.18998494744300842, 0.04047590494155884, 0.13078971207141876, -0.028984885662794113]
        + [-0.28130456805229187, 0.13952995836734772, 0.44109541177749634, -0.13237328827381134],
        [0.0007845344953238964, -0.3185568153858185, -0.0016819930169731379, -0.22372163832187653]
        + [0.042093440890312195, 0.38428372144699097, 0.16043232381343842, -0.17919638752937317]
        + [0.18908408284187317, -0.4743083119392395, 0.36655327677726746, 0.05964309722185135]
        + [-0.3066316545009613, -0.08842673152685165, -0.24162277579307556, 0.5077915191650391],
        {
            "mask_token": 1.3477516174316406,
            "encoder.cls_token": 3.564898729324341,
            "encoder.pos_embed": 3.794281005859375,
            "encoder.patch_embed.proj.weight": 5.543033599853516,
            "encoder.blocks.1.mlp.fc2.weight": 3.986816883087158,
            "heads.shared.mlp.0.weight": 5.490743160247803,
            "heads.shared.prototypes": 7.629257678985596,
        },
    ),
    (8, 3, True): (
        {"loss": 12.61995792388916, "loss_class": 8.671059608459473, "loss_patch": 3.9488980770111084 / 0.7},
        [-0.2128048837184906, -0.3275170624256134, -0.2188202291727066, 0.15802031755447388]
        + [0.2156813144683838, -0.0853876993060112, 0.29425206780433655, -0.20344239473342896]
        + [-0.19352184236049652, 0.05014067143201828, 0.11795972287654877, -0.034761518239974976]
        + [-0.2681540250778198, 0.12269449979066849, 0.4312323331832886, -0.11865843832492828],
        [-7.511721923947334e-05, -0.3186890482902527, -0.002484517404809594, -0.2246452271938324]
        + [0.04241397976875305, 0.384725958108902, 0.1598757803440094, -0.18112711608409882]
        + [0.19056633114814758, -0.4749390482902527, 0.3651292324066162, 0.06089264899492264]
        + [-0.30743545293807983, -0.0872136652469635, -0.23989315330982208, 0.5076255798339844],
        {
            "mask_token": 1.9065792560577393,
            "encoder.cls_token": 3.145163059234619,
            "encoder.patch_embed.proj.weight": 4.828193187713623,
            "encoder.blocks.1.mlp.fc2.weight": 4.150947093963623,
            "heads.shared.mlp.0.weight": 6.067783355712891,
            "heads.shared.prototypes": 8.12816333770752,
        },
    ),
}


@pytest.mark.parametrize("case", RECORDED, ids=str)
def test_step__equals_ibot(make_batch, draw_weights, case):
    """Losses, gradients and centres are those of the authors' code for the same weights, bytes and masks.

    Recorded from bytedance/ibot at commit da316d82636a7a7356835ef224b13d5f3ace0489: ``VisionTransformer``
    (``masked_im_modeling``), ``iBOTHead`` (``shared_head``, ``norm_last_layer``), ``MultiCropWrapper`` and
    ``iBOTLoss(16, 16, 2, local views, 0.04, 0.07, 0.05, 0.09, 3, 10, lambda2=0.7)`` at epoch 1, temperatures of 0.055
    and 0.07, from centres that are not 0; float32, PyTorch 2.15 on a CPU.  Small local views as in
    ``test_step__equals_dino``.
    """
    size, num_local, one_position = case
    losses, class_centre, patch_centre, norms = RECORDED[case]
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(patch=4, dim=32, depth=2, heads=4, position="learned"), image_size=16)
    config = IbotConfig(
        class_level=level(),
        patch_level=level(weight=0.7),
        patch_temperature=TemperatureConfig(teacher_start=0.05, teacher_end=0.09),
    )
    method = Ibot(encoder, config, num_steps=100)
    stream = np.random.RandomState(2)
    for seed, module in enumerate((method.student, method.teachers["teacher"].module)):
        draw_weights(module, seed)
        positions = torch.from_numpy(0.3 * stream.standard_normal((1, 17, 32)))
        if one_position:
            positions[:, 1:] = positions[:, 1:2]
        module.get_parameter("encoder.pos_embed").data.copy_(positions)
    centres = [method.state[f"{name}_level"].center for name in ("class", "patch")]
    for centre in centres:
        centre.copy_(torch.from_numpy(0.3 * stream.standard_normal(16)))
    sizes = {"global": (2, 16), "local": (num_local, size)}
    views = {
        name: torch.from_numpy(stream.randint(0, 256, (count, BATCH, 3, side, side)).astype(np.uint8))
        for name, (count, side) in sizes.items()
    }
    hidden = torch.from_numpy(stream.random_sample((2, BATCH, TOKENS)) < np.array([0, 0.1, 0.3, 0.5])[:, None])
    batch = replace(make_batch(batch=BATCH), views=views, token_mask={"global": hidden}, visible={}, masked={})
    _, _, loss, metrics = step_of(method, batch, step=5)
    loss.backward()
    commit(method.state)
    found = {"loss": loss.item()} | {name: value.item() for name, value in metrics.items()}
    assert found == pytest.approx(losses, rel=1e-5)
    for centre, expected in zip(centres, (class_centre, patch_centre), strict=True):
        torch.testing.assert_close(centre, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert {name: method.student.get_parameter(name).grad.norm().item() for name in norms} == pytest.approx(
        norms, rel=1e-4
    )


# ---------------------------------------------------------------------------------------- who sees what, what follows


def pixels_of(hidden, patch=4):
    """Returns the mask of tokens as one of pixels, ``view batch 1 height width``."""
    grid = hidden.unflatten(-1, (4, 4))
    return F.interpolate(grid.float(), scale_factor=patch, mode="nearest").bool()[:, :, None]


def test_student__does_not_see_hidden_patches_but_the_teacher_does(build, masked):
    method, batch = build(), masked()
    flipped = torch.where(pixels_of(batch.token_mask["global"]), 255 - batch.views["global"], batch.views["global"])
    other = replace(batch, views={**batch.views, "global": flipped})
    with torch.no_grad():
        first, second = method.student(batch), method.student(other)
        assert all(torch.equal(value, second[name]) for name, value in first.items())
        changed = method.targets(batch, 0)["class_scores"] != method.targets(other, 0)["class_scores"]
    hides = batch.token_mask["global"].flatten(0, 1).any(dim=-1)
    assert torch.equal(changed.any(dim=-1), hides) and not hides[0]


def test_student__an_unmasked_image_is_seen_as_the_teacher_sees_it(build, masked):
    method, batch = build(), masked(num_local=0)
    with torch.no_grad():
        method.student.mask_token.fill_(1.0)
        outputs, targets = method.student(batch), method.targets(batch, 0)
    torch.testing.assert_close(outputs["class_scores"][0], targets["class_scores"][0])
    torch.testing.assert_close(outputs["patch_scores"][BATCH], targets["patch_scores"][BATCH])
    assert (outputs["class_scores"][1] - targets["class_scores"][1]).abs().max() > 1e-3


def test_loss__a_batch_that_hides_nothing_has_no_patch_loss(build, masked):
    method, batch = build(), masked()
    nothing = replace(batch, token_mask={"global": torch.zeros_like(batch.token_mask["global"])})
    _, _, loss, metrics = step_of(method, nothing)
    loss.backward()
    assert metrics["loss_patch"] == 0.0 and loss == metrics["loss_class"]
    assert method.student.mask_token.grad.abs().sum() == 0.0


def test_loss__local_views_reach_the_class_loss_alone(build, masked):
    method, batch = build(), masked()
    before = step_of(method, batch)[3]
    after = step_of(method, replace(batch, views={**batch.views, "local": 255 - batch.views["local"]}))[3]
    assert before["loss_class"] != after["loss_class"] and before["loss_patch"] == after["loss_patch"]


def test_targets__each_level_has_its_own_temperatures(build, masked):
    temperatures = TemperatureConfig(teacher_start=0.02, teacher_end=0.02)
    plain, other = build(), build(patch_temperature=temperatures)
    first, second = (method.targets(masked(), 0) for method in (plain, other))
    assert torch.equal(first["class_labels"], second["class_labels"])
    assert second["patch_labels"].max() > first["patch_labels"].max()


def test_teacher__follows_all_but_the_mask_token(build):
    method = build()
    teacher, student = method.teachers["teacher"], method.student.state_dict()
    own = teacher.module.state_dict()
    assert own.keys() == {name for name in student if name.startswith(teacher.follows)}
    assert student.keys() - own.keys() == {"mask_token"}
    assert all(torch.equal(value, student[name]) for name, value in own.items())
    assert not any(name.endswith("mask_token") for name, _ in method.student.encoder.named_parameters())


def test_mask_token__has_no_weight_decay(build):
    groups = parameter_groups(build(), OptimizerConfig(weight_decay=0.04, head_weight_decay=0.1))
    (group,) = (group for group in groups if "mask_token" in group["names"])
    assert group["weight_decay"] == 0.0 and not group["is_scheduled"]


def test_commit__moves_the_centres_of_both_levels_and_rollback_does_not(build, masked):
    method = build()
    for act, moves in ((rollback, False), (commit, True)):
        step_of(method, masked())
        act(method.state)
        centres = [method.state[f"{name}_level"].center for name in ("class", "patch")]
        assert all(bool(centre.abs().sum() > 0) == moves for centre in centres)
    assert not torch.equal(*centres)


@pytest.mark.parametrize("left_out", ["class", "patch"])
def test_ibot__a_level_of_weight_zero_is_left_out(build, masked, left_out):
    kept = {"class": "patch", "patch": "class"}[left_out]
    method = build(**{f"{left_out}_level": level(weight=0.0)}, shared_head=False)
    outputs, _, loss, metrics = step_of(method, masked(num_local=0))
    assert list(method.student.heads) == [kept] and metrics.keys() == {f"loss_{kept}"}
    assert f"{left_out}_scores" not in outputs and loss == metrics[f"loss_{kept}"]
    figures = method.monitors(outputs, method.targets(masked(num_local=0), 0))
    assert f"information_{kept}_teacher" in figures and f"information_{left_out}_teacher" not in figures


def test_loss__falls_when_trained(build, masked):
    method, batch = build(), masked()
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

CLASSLESS, PATCHLESS = (
    IbotConfig(class_level=level(weight=0.0), patch_level=level()),
    IbotConfig(class_level=level(), patch_level=level(weight=0.0)),
)


@pytest.mark.parametrize(
    ("config", "facts", "fields"),
    [
        (IbotConfig(), {"num_masked": 0}, ["views.mask.ratio", "method.ibot.patch_level"]),
        (IbotConfig(), {"corrupted": True}, ["views.corruption.coverage", "ibot"]),
        (IbotConfig(), {"num_views": 1}, ["views.count is 1", "views.local.count is 0", "method.ibot.class_level"]),
        (CLASSLESS, {"num_local": 2}, ["views.local.count is 2", "method.ibot.class_level.weight is 0"]),
    ],
)
def test_check_views__names_the_fields(config, facts, fields):
    with pytest.raises(ValueError) as caught:
        check_method_views(
            MethodConfig(name="ibot", ibot=config), ViewFacts(**({"num_views": 2, "num_masked": None} | facts))
        )
    assert all(name in str(caught.value) for name in fields)


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        (IbotConfig(), {}),
        (IbotConfig(), {"num_masked": 3, "num_local": 10}),
        (CLASSLESS, {"num_views": 1}),
        (PATCHLESS, {"num_masked": 0}),
    ],
)
def test_check_views__enough(config, facts):
    check_method_views(
        MethodConfig(name="ibot", ibot=config), ViewFacts(**({"num_views": 2, "num_masked": None} | facts))
    )


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (
            {"class_level": level(weight=0.0), "patch_level": level(weight=0.0)},
            r"class_level\.weight and patch_level\.weight are both 0",
        ),
        ({"patch_level": level(head=OTHER_HEAD)}, r"ibot\.shared_head is true, but class_level\.head"),
    ],
)
def test_ibot_config__rejects(settings, field):
    with pytest.raises(ValueError, match=field):
        IbotConfig(**({"class_level": level()} | settings))
