from pathlib import Path

import pytest
import timm
import torch

from maestri.engine.errors import CheckpointError
from maestri.evals.features import encoder_extractor
from maestri.evals.timm_models import TimmModel, build_timm, load_timm, timm_extractor
from maestri.model.encoder import PIXEL_MEAN, PIXEL_STD, EncoderConfig, build_encoder


def test_timm_extractor__the_same_weights_have_the_features_of_our_encoder():
    ours = build_encoder(EncoderConfig(patch=8, dim=32, heads=2, depth=2), image_size=32).eval()
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 0}
    theirs = timm.models.VisionTransformer(**shape).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    model = TimmModel(module=theirs, mean=PIXEL_MEAN, std=PIXEL_STD, size=32)
    with torch.no_grad():
        expected, found = encoder_extractor(ours)(images), timm_extractor(model)(images)
    for pooling in ("cls", "mean"):
        torch.testing.assert_close(found[pooling], expected[pooling], rtol=1e-4, atol=1e-4)


def test_timm_extractor__no_class_token_no_cls_and_the_norm_behind_the_average():
    model = timm.models.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        num_heads=2,
        depth=1,
        num_classes=0,
        class_token=False,
        global_pool="avg",
    ).eval()
    torch.nn.init.constant_(model.fc_norm.bias, 3.0)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        found = timm_extractor(TimmModel(module=model, mean=(0.5,) * 3, std=(0.5,) * 3, size=32))(images)
        expected = model((images / 255 - 0.5) / 0.5)  # what timm itself gives without classifier
    assert set(found) == {"mean"}
    torch.testing.assert_close(found["mean"], expected, rtol=1e-4, atol=1e-4)


def test_load_timm__a_classifier_is_left_out_and_all_else_must_fit(tmp_path: Path):
    weights = timm.create_model("test_vit").state_dict()
    torch.save({"model": weights, "epoch": 3}, tmp_path / "with_head.pth")
    model = build_timm("test_vit")
    load_timm(model, tmp_path / "with_head.pth")
    torch.testing.assert_close(model.module.cls_token, weights["cls_token"])
    torch.save(weights | {"decoder.weight": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(
        CheckpointError, match="1 weights differ, the first is decoder.weight: \\[1\\] in the file, absent"
    ):
        load_timm(model, tmp_path / "more.pth")


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("test_vitt", 0, "did you mean 'test_vit"),
        ("resnet18", 0, "no vision transformer"),
        ("resnet18", 32, "--size 32"),
        ("test_vit", 40, "multiple of test_vit's patch"),
    ],
)
def test_build_timm__says_what_is_wrong(name: str, size: int, expected: str):
    with pytest.raises(ValueError, match=expected):
        build_timm(name, size)
