"""A folder with small shards, small recipes, and a study of them."""

from pathlib import Path

import pytest
from small_run import write_shards

from tests.study.small_study import STUDY, write_recipes


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards of noise, two recipes and ``study.yaml``."""
    folder = tmp_path_factory.mktemp("study")
    write_shards(folder)
    write_recipes(folder)
    (folder / "study.yaml").write_text(STUDY)
    return folder


@pytest.fixture
def folder(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test: the same inputs, in a folder of its own."""
    for path in inputs.iterdir():
        if path.name != "images":
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
