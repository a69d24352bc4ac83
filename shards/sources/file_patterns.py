"""Files that one path stands for: itself, a folder's, a glob's or a brace notation's."""

import errno
import math
import os
import re
from glob import glob, has_magic
from itertools import islice
from pathlib import Path

from maestri.shards.errors import ShardError

MAX_FILES = 1 << 20
"""What a pattern may stand for; more is taken for a slip of the pen."""
_SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip

_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?=\}|\.\.)")


def files_at(path: Path, suffix: str, *, split: str = "") -> tuple[Path, ...]:
    """Returns the files that a path stands for, sorted by name, those of a brace notation in its order.

    Args:
        path: a file, a folder with such files at any depth, a glob (``train-*.tar``) or a brace notation
            (``train-{000..146}.tar``) as webdataset's users write it.
        suffix: which of a folder's files, such as ``.tar``.
        split: of a folder, only files with this word in their path below it; ``val`` and ``validation`` are the same.

    Raises:
        ShardError: there are none, one is missing, or a folder holds several splits and none was asked for.
        OSError: a folder cannot be read.
    """
    there = kind_of(path)
    if there == "folder":
        return _files_in(path, suffix, split)
    if split:
        raise ShardError(f"--split is for folders, and {path} is none; leave it out")
    if there:
        return (path,)
    text = str(path)
    if "{" in text:
        files = _expanded(text)
    elif has_magic(text):
        files = tuple(Path(name) for name in sorted(glob(text)))  # noqa: PTH207  # absolute patterns too
        if not files:
            raise ShardError(f"no file matches {path}")
    else:
        raise ShardError(f"there is no {path}")
    for file in files:
        if kind_of(file) != "file":
            raise ShardError(f"there is no file {file}, which {path} stands for")
    return files


def is_pattern(path: Path) -> bool:
    """Returns whether a path is a glob or a brace notation, and not the name of something that is there."""
    return (has_magic(str(path)) or "{" in str(path)) and not kind_of(path)


def short_names(files: tuple[Path, ...]) -> tuple[str, ...]:
    """Returns the files' names, with as many folders as keep them apart."""
    names = tuple(file.name for file in files)
    if len(set(names)) == len(names):
        return names
    top = os.path.commonpath([os.path.abspath(file.parent) for file in files])  # noqa: PTH100  # links stay
    names = tuple(Path(os.path.relpath(file, top)).as_posix() for file in files)
    if len(set(names)) < len(names):
        raise ShardError(f"{next(file for file in files if files.count(file) > 1)} is named twice")
    return names


def kind_of(path: Path) -> str:
    """Returns ``folder``, ``file`` or nothing; a list in braces may be longer than a file's name can be."""
    try:
        return "folder" if path.is_dir() else "file" if path.exists() else ""
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return ""
        raise


def _files_in(folder: Path, suffix: str, split: str) -> tuple[Path, ...]:
    below = {}
    for above, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.endswith(suffix) and not name.startswith("."):
                file = Path(above, name)
                below[file.relative_to(folder).as_posix()] = file
    if not below:
        raise ShardError(f"{folder} holds no {suffix} files")
    splits = {name: _splits_in(name.removesuffix(suffix)) for name in below}
    found = {word for words in splits.values() for word in words}
    if split:
        wanted = _SPLITS.get(split.lower(), split.lower())
        chosen = [name for name, words in splits.items() if wanted in words or split in Path(name).parts[:-1]]
        if not chosen:
            there = f"those there are {', '.join(sorted(found))}" if found else "their names tell no split"
            raise ShardError(f"{folder} holds no {suffix} files of split '{split}'; {there}")
        return tuple(below[name] for name in sorted(chosen))
    if len(found) > 1:
        hint = " or ".join(f"--split {word}" for word in sorted(found))
        raise ShardError(f"{folder} holds {suffix} files of several splits ({', '.join(sorted(found))}); say {hint}")
    return tuple(below[name] for name in sorted(below))


def _splits_in(name: str) -> set[str]:
    return {_SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLITS}


def _expanded(text: str) -> tuple[Path, ...]:
    from braceexpand import braceexpand

    try:
        ranges = [abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(text)]
        if math.prod(ranges) > MAX_FILES:  # braceexpand makes whole ranges before it yields the first name
            raise ShardError(f"{text[:200]} stands for more than {MAX_FILES} files")
        names = tuple(islice(braceexpand(text), MAX_FILES + 1))
    except ShardError:
        raise
    except (ValueError, RecursionError):
        raise ShardError(f"the braces of {text[:200]} don't pair up") from None
    if len(names) > MAX_FILES:
        raise ShardError(f"{text} stands for more than {MAX_FILES} files")
    return tuple(Path(name) for name in names)


def _raise(error: OSError) -> None:
    raise error
