"""Names of samples: relative paths made safe for WebDataset, DALI's index and file systems."""

import re
from collections import Counter
from collections.abc import Sequence

_UNSAFE = re.compile(r"[%.\\\s\x00-\x1f\x7f\ud800-\udfff]|^_(?=_[^/]*__(?:/|$))")
"""Dots start webdataset's extension; blanks split DALI's lines; lone surrogates are bytes that are not UTF-8; a first
folder ``__so__`` would be skipped by webdataset as metadata."""


def escaped(text: str) -> str:
    """Returns the text with unsafe characters as ``%XX``, byte by byte; ``unescaped`` turns it back."""
    return _UNSAFE.sub(lambda match: "".join(f"%{b:02X}" for b in match[0].encode("utf-8", "surrogateescape")), text)


def unescaped(key: str) -> str:
    """Returns the text that ``escaped`` was given."""
    raw = re.sub(rb"%([0-9A-F]{2})", lambda match: bytes((int(match[1], 16),)), key.encode())
    return raw.decode("utf-8", "surrogateescape")


def unique_keys(files: Sequence[str]) -> tuple[str, ...]:
    """Returns escaped paths without extension; files that differ only in their extension keep it, escaped too.

    Args:
        files: relative paths with ``/`` between folders, each with an extension; all different.
    """
    assert len(set(files)) == len(files), "two files have the same path"
    whole = [escaped(name) for name in files]
    keys = [escaped(_without_extension(name)) for name in files]
    # A whole name may be another file's stem (a.jpg, a.png, a.jpg.png), so go on until nothing is shared.
    while shared := {key for key, times in Counter(keys).items() if times > 1}:
        keys = [full if key in shared else key for key, full in zip(keys, whole, strict=True)]
    return tuple(keys)


def _without_extension(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + (base.rpartition(".")[0] or base)
