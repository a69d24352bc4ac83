"""Damaged manifests and indexes: clear errors or right images, and nothing else."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType


def load(name: str) -> ModuleType:
    """Returns a module that lies beside this file; test folders are no packages."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_open__damaged_manifest_or_index_is_a_clear_error(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "set"))
    assert list(load("set_mutations").problems(folder, 1000)) == []
