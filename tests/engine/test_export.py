import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from maestri.engine.checkpoint import checksums
from maestri.engine.export import export, run
from maestri.model.encoder import EncoderConfig, build_encoder, normalise


@pytest.fixture
def tiny_run(tmp_path: Path) -> Path:
    """A run with one checkpoint of timm's smallest usual ViT, and its encoder's output for one image."""
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(patch=16, dim=192, depth=12, heads=3), image_size=224).eval()
    image = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        torch.save((image, encoder(image)), tmp_path / "expected.pt")
    folder = tmp_path / "run" / "checkpoints" / "step_00000007"
    (folder / "teachers").mkdir(parents=True)
    weights = {f"encoder.{name}": value.clone() for name, value in encoder.state_dict().items()}
    save_file(weights | {"class_head.prototypes": torch.ones(2, 2)}, folder / "student.safetensors")
    save_file({"projector.weight": torch.ones(2)}, folder / "teachers" / "projector.safetensors")
    config = {"encoder": {"patch": 16, "dim": 192, "depth": 12, "heads": 3}, "views": {"size": 224}}
    description = {"format": 2, "step": 7, "updates": 7, "world_size": 1, "loader": {}, "config": config}
    (folder / "run.json").write_text(json.dumps(description | {"files": checksums(folder)}))
    return tmp_path / "run"


def test_export__timm_loads_it_untouched(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "vit.safetensors"
    told = export(tiny_run, out)
    assert "the student after step 7, 5.5 M parameters; width 192, 12 blocks, 3 heads, patch 16, image 224" in told
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, checkpoint_path=str(out)).eval()
    image, expected = torch.load(tmp_path / "expected.pt")
    with torch.no_grad():
        found = model.forward_features(normalise(image, dim=1))
    assert torch.allclose(found, expected, atol=1e-5)
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["maestri"])["step"] == 7


def test_export__bad_input_is_one_line(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "vit.safetensors")
    (tmp_path / "there.safetensors").write_text("mine")
    for arguments, message in (
        ([str(tiny_run), str(tmp_path / "vit.pth")], "must end in .safetensors"),
        ([str(tiny_run), str(tmp_path / "there.safetensors")], "is there already"),
        ([str(tiny_run), str(tmp_path / "no" / "vit.safetensors")], "there is no folder"),
        ([str(tmp_path / "nothing"), out], "holds no whole checkpoint"),
        ([str(tiny_run), out, "--model", "nobody"], "holds no weights of 'nobody'"),
        ([str(tiny_run), out, "--model", "projector"], "has no encoder"),
    ):
        assert run(arguments) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and message in said
    assert (tmp_path / "there.safetensors").read_text() == "mine" and not Path(out).exists()
