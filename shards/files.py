"""Files that appear whole or not at all."""

import hashlib
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Brings a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is either the old one or, whole and on the disk, the new one."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_bytes(content)
        sync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
