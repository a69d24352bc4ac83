"""Finding, checking and reading checkpoints; test_ranks.py and tests/test_train.py write and continue them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from maestri.engine.checkpoint import checksums, discard, is_complete, latest, load_weights, prune, verify
from maestri.engine.checkpoint import whole_checkpoints as whole
from maestri.engine.errors import CheckpointDamaged, CheckpointError


def make(run: Path, step: int, *, finished: bool = True) -> Path:
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(2)}, folder / "student.safetensors")
    if finished:
        description = {"format": 2, "step": step, "world_size": 1, "updates": step, "loader": {}, "config": {}}
        (folder / "run.json").write_text(json.dumps(description | {"files": checksums(folder)}))
    return folder


def test_latest__follows_the_pointer_and_falls_back_to_the_newest_whole(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    first, second = make(tmp_path, 1), make(tmp_path, 2)
    assert latest(tmp_path) == second
    (tmp_path / "checkpoints" / "latest").write_text("step_00000001\n")
    assert whole(tmp_path) == [first, second]
    (tmp_path / "checkpoints" / "latest").write_text("step_00000009\n")
    make(tmp_path, 3, finished=False)
    assert whole(tmp_path) == [second, first]


def test_verify__finds_every_kind_of_damage(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    assert verify(folder)["step"] == 1
    weights = folder / "student.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointDamaged, match=r"student\.safetensors is not what was written"):
        verify(folder)
    weights.unlink()
    with pytest.raises(CheckpointDamaged, match=r"student\.safetensors: No such file"):
        verify(folder)
    run = folder / "run.json"
    for text in ("{", "[]", '{"format": 2}', "\0"):
        run.write_text(text)
        with pytest.raises(CheckpointDamaged, match=r"run\.json"):
            verify(folder)
    run.write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match="has format 1; this Maestri continues format 2"):
        verify(folder)


def test_load_weights__says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    assert torch.equal(load_weights(folder)["weight"], torch.ones(2))
    with pytest.raises(CheckpointError, match="holds no weights of 'labelling_teacher'"):
        load_weights(folder, "labelling_teacher")
    (folder / "student.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_weights(folder)


def test_prune__keeps_the_newest_and_every_nth(tmp_path: Path) -> None:
    for step in range(1, 9):
        make(tmp_path, step)
    prune(tmp_path / "checkpoints", keep=2, keep_every=3)
    assert [path.name[-1] for path in whole(tmp_path)] == ["8", "7", "6", "3"]
    prune(tmp_path / "checkpoints", keep=1, keep_every=0)
    assert [path.name[-1] for path in whole(tmp_path)] == ["8"]


def test_is_complete__needs_the_last_step_and_the_summary(tmp_path: Path) -> None:
    make(tmp_path, 4)
    assert not is_complete(tmp_path, 4)
    (tmp_path / "summary.json").write_text("{}")
    assert is_complete(tmp_path, 4) and not is_complete(tmp_path, 5)


def test_discard__removes_only_what_a_run_makes(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "metrics.jsonl").write_text("")
    discard(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
