"""Lists of class names: from a set, from a file, and of several splits together."""

from collections.abc import Sequence
from pathlib import Path

from maestri.shards.errors import ShardError
from maestri.shards.manifest import Manifest


def class_names_of(path: Path) -> tuple[str, ...]:
    """Returns the class names of a set, or of a text file with one a line.

    Raises:
        ShardError: it is neither, empty, or has a name twice.
    """
    if path.is_dir():
        return Manifest.read(path).class_names
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(f"--classes {path} cannot be read: {error}") from None
    if not names or len(set(names)) != len(names):
        raise ShardError(f"--classes {path} lists {'a class twice' if names else 'no class'}")
    return names


def common(lists: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Returns one list for splits that have their own: the one that holds all others, else all names sorted.

    Numbers are sorted as numbers.
    """
    everything = {name for names in lists for name in names}
    longest = max(lists, key=len, default=())
    if len(longest) == len(everything):
        return longest
    if all(name.isascii() and name.isdigit() for name in everything):
        return tuple(sorted(everything, key=lambda name: (int(name), name)))
    return tuple(sorted(everything))
