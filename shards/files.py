"""Files that appear whole or not at all."""

import os
from pathlib import Path

import xxhash

_CHUNK = 1 << 22


def sync(path: Path) -> None:
    """Brings a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, content: bytes, *, drafts: Path | None = None) -> None:
    """Writes a file that is either the old one or, whole and on the disk, the new one.

    Args:
        path: of the file.
        content: of the file.
        drafts: folder for the unfinished file, on the same disk, where several processes may write the same one.
    """
    draft = (drafts or path.parent) / f".{path.name}.tmp"
    try:
        draft.write_bytes(content)
        sync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


def xxh128_of(path: Path) -> str:
    """Returns the 128-bit XXH3 checksum of a file, hexadecimal, as ``xxhsum -H2`` prints it."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()
