"""Metrics at Weights & Biases, which keeps them on disk while there is no connection."""

import builtins
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from maestri.engine.boards import open_boards
from maestri.engine.config import LoggingConfig
from maestri.engine.errors import RunError
from maestri.engine.logs import RunLog

SETTINGS = LoggingConfig(tensorboard=False, wandb="maestri-tests")


def written(folder: Path, *, last: str) -> str:
    """Returns the text that an offline run's file holds, among its bytes; its service may write after the run's end."""
    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    while last not in (text := path.read_bytes().decode("latin-1")) and time.monotonic() < deadline:
        time.sleep(0.1)
    return text


def test_weights_and_biases__takes_rows_and_goes_on_under_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    boards = open_boards(SETTINGS, tmp_path, first_step=0, config={"encoder": {"dim": 4321}})
    log = RunLog(tmp_path, first_step=0, boards=boards)
    log.write("train", 3, {"loss": 0.125, "rank_me": 7.5})
    log.sync()
    log.close()
    text = written(tmp_path, last="0.125")
    assert "train/loss" in text and "train/rank_me" in text and "0.125" in text and "4321" in text
    identity = (tmp_path / "wandb_id").read_text().strip()
    assert len(identity) == 16 and identity in text
    for board in open_boards(SETTINGS, tmp_path, first_step=3, config={}):
        board.close()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) >= 1 and all(run.name.endswith(identity) for run in runs)


def test_open_boards__names_the_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] == "wandb":
            raise ModuleNotFoundError(name)
        return imported(name, *arguments, **keywords)

    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RunError, match="package wandb is not installed: pip install wandb"):
        open_boards(SETTINGS, tmp_path, first_step=0, config={})
    assert not (tmp_path / "wandb_id").exists()
