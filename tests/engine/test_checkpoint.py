"""Finding and reading checkpoints; writing and resuming them is in test_ranks.py and tests/test_train.py."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from maestri.engine.checkpoint import discard, latest, load_weights
from maestri.engine.errors import CheckpointError


def make(run: Path, step: int, *, whole: bool = True) -> Path:
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    if whole:
        (folder / "run.json").write_text("{}")
    return folder


def test_latest__follows_the_pointer_and_falls_back_to_the_newest_whole(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    first, second = make(tmp_path, 1), make(tmp_path, 2)
    assert latest(tmp_path) == second
    (tmp_path / "checkpoints" / "latest").write_text("step_00000001\n")
    assert latest(tmp_path) == first
    (tmp_path / "checkpoints" / "latest").write_text("step_00000009\n")
    make(tmp_path, 3, whole=False)
    assert latest(tmp_path) == second


def test_load_weights__says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    save_file({"weight": torch.ones(2)}, folder / "student.safetensors")
    assert torch.equal(load_weights(folder)["weight"], torch.ones(2))
    with pytest.raises(CheckpointError, match="holds no weights of 'labelling_teacher'"):
        load_weights(folder, "labelling_teacher")
    (folder / "student.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_weights(folder)


def test_discard__removes_only_what_a_run_makes(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "metrics.jsonl").write_text("")
    discard(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
