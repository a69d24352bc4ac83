"""Every recipe can be read, and its method looks at what its views carry."""

from pathlib import Path

import pytest

from maestri.engine.config_files import load_config
from maestri.model.build import MethodConfig

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("study_"))
METHODS = MethodConfig.__annotations__["name"].__args__


@pytest.mark.parametrize("name", RECIPES)
def test_recipe__is_read(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", [])
    assert config.out == f"runs/{name}"
    assert config.method.name in name or name == "demo"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", ["fashion_mnist", "stamps", "imagenet"])
def test_recipes__each_method_has_one(method: str, data: str) -> None:
    assert [name for name in RECIPES if name.startswith(data) and method in name.split("_")]
