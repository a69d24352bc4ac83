import argparse
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from maestri.engine.errors import CheckpointError
from maestri.engine.weights_file import load_encoder, read_weights
from maestri.model.encoder import EncoderConfig, build_encoder, normalise

SMALL = EncoderConfig(patch=16, dim=192, depth=12, heads=3)


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()


def test_load_encoder__timm_classifier_is_left_out(theirs: torch.nn.Module, tmp_path: Path) -> None:
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    encoder = build_encoder(SMALL, image_size=224).eval()
    told = load_encoder(encoder, read_weights(tmp_path / "timm.safetensors"), where="timm.safetensors")
    assert told == "starting from timm.safetensors: 150 tensors of the encoder; left out: head (2)"
    image = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(encoder(image), theirs.forward_features(normalise(image, dim=1)), atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_load_encoder__published_forms(theirs: torch.nn.Module, tmp_path: Path, prefix: str) -> None:
    weights = {prefix + name: value for name, value in theirs.state_dict().items()}
    path = tmp_path / "dino.pth"
    torch.save({"teacher": weights, "student": {}, "args": argparse.Namespace(arch="vit_tiny"), "epoch": 3}, path)
    encoder = build_encoder(SMALL, image_size=224)
    load_encoder(encoder, read_weights(path, model="teacher"), where="dino.pth")
    assert torch.equal(encoder.blocks[3].mlp.fc1.weight, theirs.blocks[3].mlp.fc1.weight)
    torch.save({"model": weights, "args": argparse.Namespace()}, path)
    assert read_weights(path).keys() == weights.keys()


def test_load_encoder__positions_of_another_grid_are_resampled(theirs: torch.nn.Module) -> None:
    encoder = build_encoder(SMALL, image_size=96)
    told = load_encoder(encoder, theirs.state_dict(), where="x")
    assert "positions resampled from 14 × 14 to 6 × 6" in told
    assert torch.equal(encoder.pos_embed[:, 0], theirs.pos_embed[:, 0])
    big = torch.nn.functional.interpolate(
        theirs.pos_embed[:, 1:].view(1, 14, 14, 192).permute(0, 3, 1, 2), (6, 6), mode="bicubic", antialias=True
    )
    assert torch.allclose(encoder.pos_embed[:, 1:], big.permute(0, 2, 3, 1).flatten(1, 2), atol=1e-6)


def test_load_encoder__what_does_not_fit(theirs: torch.nn.Module) -> None:
    with pytest.raises(CheckpointError, match=r"blocks\.0\.norm1\.weight is \[192\] there and \[64\] here|cls_token"):
        load_encoder(
            build_encoder(EncoderConfig(dim=64, depth=1, heads=2), image_size=224), theirs.state_dict(), where="x"
        )
    with pytest.raises(CheckpointError, match="is absent there"):
        load_encoder(build_encoder(SMALL, image_size=224), {"weight": torch.ones(1)}, where="x")


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("run",)


def test_read_weights__bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        read_weights(tmp_path / "none.pth")
    for name, content in (("torn.pth", b"PK\3\4torn"), ("torn.safetensors", b"torn"), ("text.pth", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged"):
            read_weights(tmp_path / name)
    torch.save({"teacher": {"a": torch.ones(1)}, "student": {}}, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match="holds no weights by name; it holds teacher, student: name one"):
        read_weights(tmp_path / "two.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds no weights by name"):
        read_weights(tmp_path / "list.pth")
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="holds more than weights"):
        read_weights(tmp_path / "evil.pth")
    assert "run" not in capsys.readouterr().out
