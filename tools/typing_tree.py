"""Makes ``.typing/maestri/<room>`` links, so that static tools and pytest see the package as it is installed.

An editable install maps ``maestri.shards`` to ``shards/`` through an import hook that mypy cannot follow.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("shards", "pipelines", "model", "engine", "profiler", "evals", "study", "cli", "configs")


def main() -> int:
    """Returns 0 once every room has its link."""
    target = ROOT / ".typing" / "maestri"
    target.mkdir(parents=True, exist_ok=True)
    for room in ROOMS:
        link = target / room
        if link.is_symlink() and link.resolve() == ROOT / room:
            continue
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..") / ".." / room, target_is_directory=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
