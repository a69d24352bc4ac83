"""``maestri export``: an encoder as a file that timm loads untouched."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportArguments:
    """Write the encoder of a run, float32, as ``safetensors`` with timm's names; needs no GPU.

    For example, for a ViT-B/16:
        maestri export runs/imagenet_plmae vit_b16.safetensors --model labelling_teacher
        timm.create_model("vit_base_patch16_224", num_classes=0, checkpoint_path="vit_b16.safetensors")
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Folder of a run, whose newest checkpoint is taken, or of one checkpoint."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.safetensors")]
    """The file to write; it ends in .safetensors."""
    model: str = "student"
    """Whose encoder: the student's, or a teacher's by its role."""
    force: bool = False
    """Replace the file if it is there."""


def run(argv: list[str]) -> int:
    """Runs ``maestri export`` and returns its exit code."""
    from maestri.engine.errors import RunError

    arguments = tyro.cli(ExportArguments, prog="maestri export", args=argv)
    try:
        told = export(arguments.source, arguments.out, model=arguments.model, force=arguments.force)
    except (ValueError, RunError, OSError) as error:
        print(f"maestri export: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(told)
    return 0


def export(source: Path, out: Path, *, model: str = "student", force: bool = False) -> str:
    """Writes an encoder's weights under timm's names and returns a sentence about them.

    Raises:
        ValueError: the output's name is wrong, or it is there.
        CheckpointError: there is no checkpoint or no such model, or a file is damaged.
    """
    from safetensors.torch import save

    from maestri.engine.checkpoint import describe, latest, load_weights
    from maestri.engine.errors import CheckpointError
    from maestri.shards.files import write_atomically

    if out.suffix != ".safetensors":
        raise ValueError(f"{out} must end in .safetensors: timm tells the format by it")
    if out.exists() and not force:
        raise ValueError(f"{out} is there already; give another name or --force")
    if not out.parent.is_dir():
        raise ValueError(f"there is no folder {out.parent}")
    checkpoint = source if (source / "run.json").is_file() else latest(source)
    if checkpoint is None:
        raise CheckpointError(f"{source} holds no whole checkpoint")
    description = describe(checkpoint)
    prefix = "encoder."
    weights = {
        name.removeprefix(prefix): value.float().contiguous()
        for name, value in load_weights(checkpoint, model).items()
        if name.startswith(prefix)
    }
    if not weights:
        raise CheckpointError(f"the {model} of {checkpoint} has no encoder")
    encoder: dict[str, Any] = description["config"]["encoder"] | {"image": description["config"]["views"]["size"]}
    metadata = {
        "format": "pt",
        "maestri": json.dumps({"model": model, "step": description["step"], "encoder": encoder}),
    }
    write_atomically(out, save(weights, metadata))
    millions = sum(value.numel() for value in weights.values()) / 1e6
    return (
        f"{out}: the {model} after step {description['step']}, {millions:.1f} M parameters; width {encoder['dim']}, "
        f"{encoder['depth']} blocks, {encoder['heads']} heads, patch {encoder['patch']}, image {encoder['image']}"
    )
