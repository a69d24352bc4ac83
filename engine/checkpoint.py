"""The files of a checkpoint: which are whole, what they hold, which are kept.

``checkpoints/step_00000100/`` holds::

    run.json                    step, ranks, configuration, the loader's position, and every other file's checksum
    student.safetensors         float32 masters, frozen parameters and buffers, by name
    optimizer.safetensors       AdamW's moments, ``exp_avg/<name>`` and ``exp_avg_sq/<name>``, float32
    teachers/<role>.safetensors float32 averages by name, and what else the teacher's module holds
    method.safetensors          the method's state
    rank_00000.pt …             random generators and the unfinished period of metrics, per rank

All of it is whole tensors by name, so it can be continued with any number of ranks and at any ZeRO stage, and nothing
in it is unpickled without torch's ``weights_only``.  engine/continuation.py writes and continues checkpoints.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from maestri.engine.errors import CheckpointDamaged, CheckpointError
from maestri.shards.files import xxh128_of

FORMAT = 2
"""Version of the layout above."""


def whole_checkpoints(run: Path) -> list[Path]:
    """Returns a run's checkpoints, newest first; the one that ``latest`` names comes before all others."""
    folder = run / "checkpoints"
    found = sorted((path.parent for path in folder.glob("step_*/run.json")), reverse=True)
    pointer = folder / "latest"
    if pointer.is_file():
        named = folder / pointer.read_text(encoding="utf-8").strip()
        found.sort(key=lambda path: path != named)
    return found


def latest(run: Path) -> Path | None:
    """Returns a run's newest whole checkpoint, None if it has none."""
    return next(iter(whole_checkpoints(run)), None)


def is_complete(run: Path, steps: int) -> bool:
    """Returns whether a run has ended: its newest checkpoint is of its last step, and its summary is written."""
    found = latest(run)
    return found is not None and found.name == f"step_{steps:08d}" and (run / "summary.json").is_file()


def load_weights(checkpoint: Path, who: str = "student") -> dict[str, Tensor]:
    """Returns float32 weights by name, of the student or of a teacher by its role, on the CPU.

    Raises:
        CheckpointError: there is no such teacher, or the file is damaged.
    """
    path = checkpoint / "student.safetensors" if who == "student" else checkpoint / "teachers" / f"{who}.safetensors"
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {checkpoint} holds no weights of '{who}'") from None
    except SafetensorError as error:
        raise CheckpointDamaged(checkpoint, f"{path.name}: {error}") from None


def load_state(checkpoint: Path) -> dict[str, Tensor]:
    """Returns the method's state (centres, codebook, queue) by name, on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return load_file(checkpoint / "method.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointDamaged(checkpoint, f"method.safetensors: {' '.join(str(error).split())}") from None


def describe(checkpoint: Path) -> dict[str, Any]:
    """Returns a checkpoint's ``run.json``.

    Raises:
        CheckpointDamaged: it cannot be read.
        CheckpointError: it is of another version.
    """
    try:
        description: dict[str, Any] = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
        version = description["format"]
        if version == FORMAT:
            missing = {"step", "world_size", "updates", "loader", "config", "files"} - description.keys()
            if missing:
                raise CheckpointDamaged(checkpoint, f"run.json has no {min(missing)}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointDamaged(checkpoint, f"run.json: {' '.join(str(error).split())}") from None
    if version != FORMAT:
        raise CheckpointError(f"checkpoint {checkpoint} has format {version}; this Maestri continues format {FORMAT}")
    return description


def checksums(folder: Path) -> dict[str, str]:
    """Returns the 128-bit XXH3 checksum of every file but ``run.json``, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "run.json")
    return {path.relative_to(folder).as_posix(): xxh128_of(path) for path in files}


def verify(checkpoint: Path) -> dict[str, Any]:
    """Returns a checkpoint's ``run.json`` after reading every file against its checksum.

    Raises:
        CheckpointDamaged: a file is missing or not what was written.
        CheckpointError: it is of another version.
    """
    description = describe(checkpoint)
    for name, expected in description["files"].items():
        try:
            found = xxh128_of(checkpoint / name)
        except OSError as error:
            raise CheckpointDamaged(checkpoint, f"{name}: {error.strerror}") from None
        if found != expected:
            raise CheckpointDamaged(checkpoint, f"{name} is not what was written")
    return description


def prune(folder: Path, *, keep: int, keep_every: int) -> None:
    """Deletes all checkpoints but the newest ``keep`` and those of every ``keep_every``-th step (0: none of them)."""
    for old in sorted(folder.glob("step_*"))[:-keep]:
        step = int(old.name.removeprefix("step_"))
        if not keep_every or step % keep_every:
            shutil.rmtree(old, ignore_errors=True)


def discard(run: Path) -> None:
    """Deletes a run's checkpoints and rows, to start over."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    for folder in ("tensorboard", "skipped", "profile"):
        shutil.rmtree(run / folder, ignore_errors=True)
    (run / "wandb_id").unlink(missing_ok=True)
    (run / "metrics.jsonl").unlink(missing_ok=True)
