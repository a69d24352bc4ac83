"""Labels of ImageNet's validation images, from the development kit of ILSVRC 2012.

The ground truth numbers classes by the kit's own ``ILSVRC2012_ID``, 1 to 1000; only ``meta.mat`` tells which WordNet
identifiers those are.  They are *not* the positions in the sorted identifiers that everyone trains with.
"""

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from maestri.shards.errors import ShardError

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
MAX_KIT = 1 << 26
"""Bytes of the kit when decompressed; it has 3 million."""
_WNID = re.compile(r"n\d{8}")


def is_wnid(name: str) -> bool:
    """Returns whether a name is one of WordNet's identifiers, such as ``n01440764``."""
    return _WNID.fullmatch(name) is not None


def is_devkit(path: Path) -> bool:
    """Returns whether a file is a tar that was compressed by gzip.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def devkit_table(path: Path) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Returns the class of each validation image by the image's name without extension, and all classes, sorted.

    Raises:
        ShardError: it is not the kit, or damaged.
    """
    try:
        with gzip.open(path) as file:
            data = file.read(MAX_KIT + 1)
        if len(data) > MAX_KIT:
            raise ShardError(f"{path} has more than {MAX_KIT} bytes when decompressed: not {DEVKIT}")
        parts = {}
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                content = archive.extractfile(member) if member.isreg() and name in (GROUND_TRUTH, META) else None
                if content is not None:
                    parts[name] = content.read()
    except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError, ValueError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path} is damaged, or not {DEVKIT}: {error}") from None
    for name in (META, GROUND_TRUTH):
        if name not in parts:
            raise ShardError(f"{path} has no {name}: not {DEVKIT}")
    wnids = _wnids(path, parts[META])
    return _table(path, parts[GROUND_TRUTH].decode("ascii", "replace"), wnids), sorted(wnids.values())


def ground_truth_table(path: Path, text: str) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Returns what ``devkit_table`` does, from the ground truth's text and ``meta.mat`` or the kit beside the file.

    Raises:
        ShardError: neither is there, or something is damaged.
    """
    meta, kit = path.with_name(META), path.with_name(DEVKIT)
    if meta.is_file():
        wnids = _wnids(meta, meta.read_bytes())
        return _table(path, text, wnids), sorted(wnids.values())
    if kit.is_file():
        return devkit_table(kit)
    raise ShardError(
        f"{path} holds numbers alone; if it is ImageNet's ground truth, put {META} or {DEVKIT} beside it, "
        f"or give {DEVKIT} itself; if not, each line needs a file's name"
    )


def _table(path: Path, text: str, wnids: Mapping[int, str]) -> dict[str, tuple[str, ...]]:
    table: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(text.split(), 1):
        wnid = wnids.get(int(line)) if line.isascii() and line.isdigit() and len(line) < 10 else None
        if wnid is None:
            raise ShardError(f"{path}, line {number} of the ground truth: '{line[:20]}' is no class of {META}")
        table[f"ILSVRC2012_val_{number:08d}"] = (wnid,)
    return table


def _wnids(path: Path, data: bytes) -> dict[int, str]:
    """Returns the identifiers of the classes that have images, by ``ILSVRC2012_ID``."""
    from scipy.io import loadmat  # slow to import, and only this needs it

    try:
        synsets = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        found = {
            int(synset["ILSVRC2012_ID"]): str(synset["WNID"]).strip()
            for synset in synsets.reshape(-1)
            if int(synset["num_children"]) == 0
        }
    except Exception as error:  # on a damaged file scipy raises nearly anything
        raise ShardError(f"{path}: {META} cannot be read: {' '.join(str(error).split())[:200]}") from None
    wrong = next((name for name in found.values() if not is_wnid(name)), None)
    if wrong is not None or not found or len(set(found.values())) < len(found):
        raise ShardError(f"{path}: {META} does not list ImageNet's classes")
    return found
