"""A small run and its shards: scikit-learn's digits, 32 × 32, and an encoder that has seen none of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from maestri.engine.config import RunConfig
from maestri.engine.config_files import load_config, save_config
from maestri.evals import cli
from maestri.evals.protocol import FeatureSets, LabelledFeatures
from maestri.model.build import build_method
from maestri.shards.convert import ConvertConfig, convert

CONFIG = """
data: {shards: SHARDS, test_shards: TEST, holdout: 60, num_threads: 1}
views: {size: 32}
encoder: {patch: 8, dim: 32, heads: 2, depth: 2}
evaluation: {k: [5, 10], crop_fraction: 1.0}
engine: {device: cpu, precision: fp32}
method:
  plmae:
    decoder: {dim: 24, depth: 1, heads: 2}
    class_level: {head: {hidden: 32, layers: 2, bottleneck: 16, prototypes: 16}}
    data_level: {head: {hidden: 32, layers: 2, bottleneck: 16, prototypes: 16}}
    reconstruction: {codes: 16, head: {hidden: 32, layers: 2, bottleneck: 16, prototypes: 16}}
"""


@pytest.fixture(scope="session")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels, float32 ``1797 64``, and labels of scikit-learn's digits, shuffled."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(images)[order].float(), torch.from_numpy(labels)[order].long()


@pytest.fixture(scope="session")
def sets(digits: tuple[torch.Tensor, torch.Tensor]) -> FeatureSets:
    """The digits' own pixels as features: 900 to learn from, 300 held out, 597 to test."""
    images, labels = digits

    def part(rows: slice) -> LabelledFeatures:
        return LabelledFeatures(
            labels=labels[rows], tables={"student": {"cls": images[rows, :32], "mean": images[rows]}}
        )

    names = tuple(map(str, range(10)))
    return FeatureSets(train=part(slice(1200)), num_held_out=300, test=part(slice(1200, None)), class_names=names)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``train`` (300 digits), ``test`` (100) and ``nine`` (test without a class) as shards."""
    folder = tmp_path_factory.mktemp("evals")
    pixels = load_digits()
    for number in range(400):
        digit = pixels.target[number]
        for name in ("train",) if number < 300 else ("test", *(("nine",) if digit else ())):
            path = folder / "images" / name / f"digit_{digit}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels.images[number] * 15).astype("uint8")).resize((32, 32)).save(path)
    for name in ("train", "test", "nine"):
        convert(folder / "images" / name, folder / name, ConvertConfig(workers=1))
    return folder


@pytest.fixture(scope="session")
def run(folder: Path) -> Path:
    """A run with one checkpoint, as training leaves it: weights are those that were drawn."""
    return write_run(folder, "run")


def write_run(folder: Path, name: str) -> Path:
    """Writes a run's configuration and a checkpoint of it."""
    text = CONFIG.replace("SHARDS", str(folder / "train")).replace("TEST", str(folder / "test"))
    (folder / "recipe.yaml").write_text(text)
    config = load_config(folder / "recipe.yaml")
    run = folder / name
    checkpoint = run / "checkpoints" / "step_00000007"
    (checkpoint / "teachers").mkdir(parents=True)
    save_config(config, run)
    save_weights(config, checkpoint)
    (checkpoint / "run.json").write_text(json.dumps({"step": 7}))
    return run


def save_weights(config: RunConfig, checkpoint: Path) -> None:
    method = build_method(config.method, config.encoder, image_size=32, num_steps=10, seed=5)
    save_file(contiguous(method.student), checkpoint / "student.safetensors")
    for role, teacher in method.teachers.items():
        save_file(contiguous(teacher.module), checkpoint / "teachers" / f"{role}.safetensors")


def contiguous(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone().contiguous() for name, value in module.state_dict().items()}


@pytest.fixture
def maestri(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs ``maestri eval`` in this process; returns its exit code, output and errors."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "0")  # what the command sets is taken back
        monkeypatch.delenv(name)

    def call(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call
