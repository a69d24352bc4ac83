"""The rooms are one namespace, whole in the wheel, and import each other in one direction only."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("shards", "pipelines", "model", "engine", "profiler", "evals", "study", "cli", "configs")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
PROGRAMS = [ROOT / "train.py", *sorted((ROOT / "tools").glob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]


def module_name(path: Path) -> str:
    """Returns the dotted name under which a room's file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("maestri", *parts)).removesuffix(".__init__")


def in_wheel(path: Path) -> str:
    """Returns where a room's file lies in the wheel."""
    return f"maestri/{path.relative_to(ROOT).as_posix()}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_module__is_importable_from_this_checkout(path: Path) -> None:
    module = importlib.import_module(module_name(path))
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == path


def test_installed_package__is_this_checkout(tmp_path: Path) -> None:
    """What the programs import, without pytest's own path, from another folder."""
    code = "import maestri.pipelines; print(maestri.pipelines.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()).resolve() == ROOT / "pipelines" / "__init__.py"


@pytest.mark.parametrize("path", [*SOURCES, *PROGRAMS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports__are_absolute_in_the_namespace(path: Path) -> None:
    """A bare ``import model`` works by accident at the top of a checkout, and makes a second copy of each class."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            names = [node.module or ""]
        for name in names:
            assert name.partition(".")[0] not in (*ROOMS, "train"), f"{path.name}:{node.lineno}: import maestri.{name}"


def test_rooms__are_packages_with_types_and_a_place_in_every_list() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    banned = project["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    linted = project["tool"]["importlinter"]["root_packages"]
    for room in ROOMS:
        assert (ROOT / room / "__init__.py").is_file()
        assert (ROOT / room / "py.typed").is_file()
        assert room in banned
        assert f"maestri.{room}" in linted or room == "configs"
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "maestri").exists(), "a folder of this name hides the installed package"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of this checkout, so that the build leaves nothing here."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
        + ["--wheel-dir", str(folder), str(source)],
        check=True,
    )
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel__holds_every_module_recipe_and_type_marker(wheel: zipfile.ZipFile) -> None:
    files = set(wheel.namelist())
    recipes = sorted((ROOT / "configs").glob("*.yaml"))
    assert recipes
    markers = [ROOT / room / "py.typed" for room in ROOMS]
    assert [name for name in map(in_wheel, [*SOURCES, *recipes, *markers]) if name not in files] == []


def test_wheel__holds_nothing_outside_the_namespace(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"maestri"}
    assert "maestri/__init__.py" not in wheel.namelist(), "maestri is a namespace package"
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


VIOLATIONS = {
    "shards/extra.py": "import torch",
    "shards/upward.py": "from maestri.pipelines import batch",
    "model/views.py": "from maestri.pipelines import views",
    "model/launcher.py": "import deepspeed",
    "pipelines/model.py": "from maestri.model import build",
    "pipelines/batch.py": "from maestri.pipelines import views",
    "engine/evaluation.py": "from maestri.evals import knn",
    "evals/profile.py": "import maestri.profiler",
    "evals/compare.py": "import maestri.study",
}


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    """Runs import-linter over the rooms below ``tree/maestri`` with this project's contracts."""
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [str(program), "--no-cache", "--config", str(ROOT / "pyproject.toml")],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / "maestri" / room, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_import_contracts__hold(tree: Path) -> None:
    result = lint_imports(tree)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", VIOLATIONS)
def test_import_contracts__catch(tree: Path, name: str) -> None:
    with (tree / "maestri" / name).open("a", encoding="utf-8") as file:
        file.write(f"\n{VIOLATIONS[name]}\n")
    result = lint_imports(tree)
    assert result.returncode == 1
    assert "BROKEN" in result.stdout and name.replace("/", ".").removesuffix(".py") in result.stdout, result.stdout
