"""Names of samples: relative paths made safe for WebDataset, DALI's index and file systems."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from maestri.shards.listing import Strings

_UNSAFE = re.compile(r"[%.\\\s\x00-\x1f\x7f\ud800-\udfff]|^_(?=_[^/]*__(?:/|$))")
"""Dots start webdataset's extension; blanks split DALI's lines; lone surrogates are bytes that are not UTF-8; a first
folder ``__so__`` would be skipped by webdataset as metadata."""


def escaped(text: str) -> str:
    """Returns the text with unsafe characters as ``%XX``, byte by byte."""
    return _UNSAFE.sub(lambda match: "".join(f"%{b:02X}" for b in match[0].encode("utf-8", "surrogateescape")), text)


def unique_keys(files: Sequence[str] | Strings) -> Iterator[str]:
    """Yields escaped paths without extension; files that differ only in their extension keep it, escaped too.

    Args:
        files: relative paths with ``/`` between folders, each with an extension; all different.
    """
    is_whole = np.zeros(len(files), np.bool_)
    hashes = np.fromiter((hash(_without_extension(name)) for name in files), np.int64, len(files))
    # A whole name may be another file's stem (a.jpg, a.png, a.jpg.png), so go on until nothing is shared.
    while shared := _repeated(hashes, lambda at: files[at] if is_whole[at] else _without_extension(files[at])):
        new = [at for at in shared if not is_whole[at]]
        assert new, "two files have the same path"
        is_whole[new] = True
        hashes[new] = [hash(files[at]) for at in new]
    for name, keeps in zip(files, is_whole, strict=True):
        yield escaped(name if keeps else _without_extension(name))


def are_unique(texts: Sequence[str] | Strings) -> bool:
    """Returns whether no text is there twice."""
    hashes = np.fromiter((hash(text) for text in texts), np.int64, len(texts))
    return not _repeated(hashes, lambda at: texts[at])


def _repeated(hashes: NDArray[np.int64], text_of: Callable[[int], str]) -> list[int]:
    """Returns where texts are that occur more than once; only those whose hash does are looked at, to save memory."""
    ordered = np.sort(hashes)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(repeated):
        return []
    candidates = np.flatnonzero(np.isin(hashes, repeated)).tolist()
    counts = Counter(text_of(at) for at in candidates)
    return [at for at in candidates if counts[text_of(at)] > 1]


def _without_extension(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + (base.rpartition(".")[0] or base)
