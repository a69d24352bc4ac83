"""Maps the rooms at the top of this checkout into the ``maestri`` namespace.

The folders stay where users expect them (``pipelines/``, ``model/``, ``shards/``), but nothing called
``model`` or ``pipelines`` may land in site-packages, where another project's folder of the same name would
overwrite it.  Everything else about the package is in ``pyproject.toml``.
"""

from pathlib import Path

from setuptools import setup

ROOMS = ("shards", "pipelines", "model", "engine", "profiler", "evals", "study", "cli", "configs")


def packages() -> dict[str, str]:
    """Dotted package name → folder, for every room and every package inside one."""
    here = Path(__file__).resolve().parent
    found = {}
    for room in ROOMS:
        for init in sorted((here / room).rglob("__init__.py")):
            folder = init.parent.relative_to(here)
            found["maestri." + ".".join(folder.parts)] = folder.as_posix()
    return found


setup(
    packages=list(packages()),
    package_dir=packages(),
    package_data={name: ["py.typed"] for name in packages()}
    | {"maestri.configs": ["*.yaml", "py.typed"], "maestri.profiler": ["*.jinja", "*.css", "py.typed"]},
)
