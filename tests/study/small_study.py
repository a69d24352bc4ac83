"""Small recipes, a study of them, and what tests write beside it."""

import os
from pathlib import Path
from typing import Any

RECIPE = """
steps: 6
data: {shards: shards, holdout: 16, num_threads: 1}
views: {size: 32}
encoder: {patch: 8, dim: 32, heads: 2, depth: 2}
batch: {global_size: 8}
method: {name: METHOD, mae: {decoder: {dim: 24, depth: 1, heads: 2}}, SECTION}
engine: {device: cpu, precision: fp32, zero_stage: 0}
evaluation: {crop_fraction: 1.0}
logging: {every: 1}
"""
HEAD = "head: {hidden: 32, layers: 2, bottleneck: 16, prototypes: 16}"
PLMAE = f"plmae: {{decoder: {{dim: 24, depth: 1, heads: 2}}, class_level: {{{HEAD}}}, data_level: {{{HEAD}}}, " + (
    "reconstruction: {codes: 16}}"
)
STUDY = """
out: study
jobs: 2
timing: {rounds: 1, steps: 2}
sets:
  noise:
    budgets: {images: 48}
    judging: {k: 3, shots: [1], splits: 2}
    evaluations: 1
    entries:
      mae: {stages: {train: {recipe: mae.yaml}}}
      plmae: {stages: {train: {recipe: plmae.yaml}}}
"""


def write_recipes(folder: Path) -> None:
    """Writes ``mae.yaml`` and ``plmae.yaml``."""
    (folder / "mae.yaml").write_text(RECIPE.replace("METHOD", "mae").replace(", SECTION", ""))
    (folder / "plmae.yaml").write_text(RECIPE.replace("METHOD", "plmae").replace("SECTION", PLMAE))


def write_study(folder: Path, text: str) -> Path:
    """Writes a study over the one that is there."""
    path = folder / "study.yaml"
    path.unlink(missing_ok=True)
    path.write_text(text)
    return path


def cost(step_seconds: float = 0.5, **fields: Any) -> dict[str, Any]:
    """Returns a cost's fields."""
    return {
        "step_seconds": step_seconds,
        "images": 8,
        "peak_bytes": 10**9,
        "teachers": (),
        "rounds": (step_seconds,),
        "measured": "2026-11-21 20:00",
        **fields,
    }


def alive(process: int) -> bool:
    """Returns whether a process runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
