"""What is judged: a run's newest checkpoint, one checkpoint, or a file of weights of a timm model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from maestri.engine.checkpoint import latest, load_weights
from maestri.engine.config import EvaluationConfig, RunConfig
from maestri.engine.config_files import read_config
from maestri.engine.errors import CheckpointError
from maestri.evals.features import Extractor, Judged, encoder_extractor, raw_pixels
from maestri.evals.timm_models import build_timm, load_timm, timm_extractor
from maestri.evals.weights import load_strictly, weights_digest
from maestri.model.build import build_method
from maestri.model.encoder import Encoder
from maestri.model.method import Method

RAW_PIXELS = "raw_pixels"
RANDOM_INIT = "random_init"
STUDENT = "student"
BASELINES = (RAW_PIXELS, RANDOM_INIT)

KNN_K = (10, 20)
"""Neighbours that vote where no run says how many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Models to judge, and how whoever trained them would have them judged."""

    name: str
    """The checkpoint's or the file's name."""
    models: Mapping[str, Judged]
    """By name; baselines are among them."""
    home: Path
    """Folder that results and features are kept in."""
    results: Path
    """Folder of results."""
    size: int
    """Height and width of images in pixels."""
    crop_fraction: float
    """Side of the centre crop as a fraction of the shorter side."""
    batch_size: int
    """Images per forward pass, on each rank."""
    num_threads: int
    """CPU threads that decode."""
    executor: Literal["auto", "dali", "threads"]
    """What decodes."""
    k: tuple[int, ...]
    """Neighbours that vote."""
    temperature: float
    """Temperature of their votes."""
    shards: str
    """Training shards; empty where it names none."""
    test_shards: str
    """Test shards; empty where it names none."""
    holdout: int | None
    """Training images at the end of ``shards`` that were not trained on; None where it says nothing."""


def open_source(path: Path, device: torch.device, *, timm_name: str = "", size: int = 0) -> Source:
    """Returns what is to be judged, on the device.

    Args:
        path: a run's folder, that of one of its checkpoints, or a file of weights.
        device: where the models are to be.
        timm_name: the timm model that a file of weights is of.
        size: height and width of images, in pixels, for a file of weights; 0 = the timm model's own.

    Raises:
        ValueError: it is none of these.
        CheckpointError: there is no checkpoint, or it is damaged or of another model.
    """
    if path.is_file():
        if not timm_name:
            raise ValueError(f"{path} is a file of weights; say of which timm model by --timm NAME")
        return _open_weights(path, device, timm_name, size)
    if timm_name or size:
        what = "a folder" if path.is_dir() else "not there"
        raise ValueError(f"--timm and --size go with a file of weights; {path} is {what}")
    if (path / "config.yaml").is_file():
        checkpoint = latest(path)
        if checkpoint is None:
            raise CheckpointError(f"{path} holds no checkpoint; train it first")
        return _open_run(path, checkpoint, path / "evaluation", device)
    if (path / "run.json").is_file() and (path.resolve().parents[1] / "config.yaml").is_file():
        run = path.resolve().parents[1]
        return _open_run(run, path, run / "evaluation" / path.resolve().name, device)
    what = "is neither a run nor a checkpoint in a run's folder" if path.exists() else "is not there"
    raise ValueError(f"{path} {what}; give RUN, RUN/checkpoints/step_… or FILE --timm NAME")


def _open_run(run: Path, checkpoint: Path, results: Path, device: torch.device) -> Source:
    config = read_config(run)
    models = {
        name: _judged(encoder.to(device).eval(), encoder_extractor(encoder), {"encoder": asdict(config.encoder)})
        for name, encoder in saved_encoders(config, checkpoint).items()
    }
    if config.evaluation.baselines:
        untrained = untrained_encoder(config).to(device).eval()
        models[RAW_PIXELS] = Judged(extract=raw_pixels, identity={"raw": "pixels"})
        models[RANDOM_INIT] = _judged(untrained, encoder_extractor(untrained), {"encoder": asdict(config.encoder)})
    return Source(
        name=checkpoint.name,
        models=models,
        home=run,
        results=results,
        size=config.views.size,
        crop_fraction=config.evaluation.crop_fraction,
        batch_size=config.evaluation.batch_size,
        num_threads=config.data.num_threads,
        executor=config.data.executor,
        k=config.evaluation.k,
        temperature=config.evaluation.temperature,
        shards=config.data.shards,
        test_shards=config.data.test_shards,
        holdout=config.data.holdout,
    )


def _judged(module: nn.Module, extract: Extractor, what: Mapping[str, object]) -> Judged:
    return Judged(extract=extract, identity={**what, "weights": weights_digest(module.state_dict())})


# ------------------------------------------------------------------------------------------------- runs of ours


def untrained_encoder(config: RunConfig) -> Encoder:
    """Returns the encoder with the weights that the run's seed draws, float32, on the CPU."""
    encoder = _new_method(config).student.get_submodule("encoder")
    assert isinstance(encoder, Encoder)
    return encoder


def encoders_of(method: Method, student: nn.Module) -> dict[str, nn.Module]:
    """Returns the encoders of student and teachers by name; a teacher without one is left out."""
    modules = {STUDENT: student, **{role: teacher.module for role, teacher in method.teachers.items()}}
    encoders = {name: dict(module.named_children()).get("encoder") for name, module in modules.items()}
    return {name: encoder for name, encoder in encoders.items() if encoder is not None}


def saved_encoders(config: RunConfig, checkpoint: Path) -> dict[str, nn.Module]:
    """Returns the encoders of a checkpoint by model, float32, on the CPU.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
    """
    method = _new_method(config)
    encoders = encoders_of(method, method.student)
    for name, encoder in encoders.items():
        prefix = "encoder."
        weights = load_weights(checkpoint, name)
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        load_strictly(encoder, own, f"{checkpoint}: {name}")
    return encoders


def _new_method(config: RunConfig) -> Method:
    return build_method(
        config.method, config.encoder, image_size=config.views.size, num_steps=config.steps, seed=config.seed
    )


# ----------------------------------------------------------------------------------------------- models of timm


def _open_weights(path: Path, device: torch.device, name: str, size: int) -> Source:
    trained, untrained = build_timm(name, size), build_timm(name, size)
    load_timm(trained, path)
    models = {}
    for key, model in ((name, trained), (RANDOM_INIT, untrained)):
        model.module.to(device).eval()
        what = {"timm": name, "size": model.size, "mean": list(model.mean), "std": list(model.std)}
        models[key] = _judged(model.module, timm_extractor(model), what)
    models[RAW_PIXELS] = Judged(extract=raw_pixels, identity={"raw": "pixels"})
    home = path.with_name(f"{path.stem}_judged")
    defaults = EvaluationConfig()
    return Source(
        name=path.name,
        models=models,
        home=home,
        results=home / "evaluation",
        size=trained.size,
        crop_fraction=defaults.crop_fraction,
        batch_size=defaults.batch_size,
        num_threads=2,
        executor="auto",
        k=KNN_K,
        temperature=defaults.temperature,
        shards="",
        test_shards="",
        holdout=None,
    )
