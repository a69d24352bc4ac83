"""Tars as sources: which kind one is, and how images are read out of all kinds."""

import errno
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maestri.shards.errors import ShardError
from maestri.shards.handles import Handles
from maestri.shards.images import require_size
from maestri.shards.sources import Source
from maestri.shards.sources.file_patterns import files_at, kind_of
from maestri.shards.sources.imagenet_devkit import is_wnid
from maestri.shards.sources.tar_index import tar_members

_PEEKED = 1000
"""Members that are looked at to tell the kinds apart."""


class TarImages:
    """What all tars have in common: images are found by tar, offset and size."""

    kind = "tar"

    def __init__(self, path: Path, tars: Sequence[Path]) -> None:
        """Takes what the user gave and the tars that it stands for."""
        self.path = path
        self.files = tuple(tars)
        self._handles: Handles | None = None

    def __getstate__(self) -> dict[str, object]:
        """Leaves open files out: a worker process opens its own."""
        return {**self.__dict__, "_handles": None}

    def load(self, name: str, place: NDArray[np.int64]) -> bytes:
        """Returns the member's content.

        Raises:
            BadImage: it is too large to be an image.
            OSError: the tar cannot be read, or is shorter than it was; the error names it.
        """
        number, offset, size = place.tolist()
        require_size(size)
        return self._pread(number, offset, size)

    def close(self) -> None:
        """Closes open files; the next ``load`` opens them again."""
        if self._handles is not None:
            self._handles.close()
            self._handles = None

    def _pread(self, number: int, offset: int, size: int) -> bytes:
        if self._handles is None:
            self._handles = Handles(self.files)
        path = str(self.files[number])
        try:
            data = self._handles.pread(number, size, offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None  # a failed read names no file
        if len(data) != size:
            raise OSError(errno.EIO, "shorter than when it was listed", path)
        return data


def open_tars(
    path: Path,
    *,
    split: str = "",
    labels: Path | None = None,
    class_names: Sequence[str] = (),
    image_key: str = "",
    label_key: str = "",
) -> Source:
    """Returns the source that one or more tars are.

    - A tar of tars, as ``ILSVRC2012_img_train.tar``, or tars called by WordNet identifiers: a class for each tar.
    - Several tars, or one whose members go together by name (``7.jpg``, ``7.cls``): WebDataset.
    - Any other tar: folders in it are classes, or a label file tells them, as for ``ILSVRC2012_img_val.tar``.

    Args:
        path: a tar, a folder of tars, a glob or a brace notation.
        split: which of a folder's tars, or of a tar's folders.
        labels: a label file for a tar of images; see ``label_file``.
        class_names: of all classes, where they are known.
        image_key: which member of a WebDataset sample is the image; see ``WebDatasetSource``.
        label_key: which member, or which key of a JSON member, is the label.

    Raises:
        ShardError: there is no tar, or options that don't go with this kind are given.
        OSError: a file cannot be read.
    """
    from maestri.shards.sources.class_tars import ClassTarsSource, ImageTarSource
    from maestri.shards.sources.webdataset_tars import WebDatasetSource

    is_single = kind_of(path) == "file"
    tars = files_at(path, ".tar", split="" if is_single else split)
    names = [name for name, _, _ in islice(tar_members(tars[0]), _PEEKED)]
    if is_single and names and names[0].lower().endswith(".tar"):
        _refuse(path, "a tar of tars", split=split, labels=labels, image_key=image_key, label_key=label_key)
        return ClassTarsSource(path, tars, is_nested=True, class_names=class_names)
    if not is_single and all(is_wnid(tar.stem) for tar in tars):
        _refuse(path, "a set of class tars", labels=labels, image_key=image_key, label_key=label_key)
        return ClassTarsSource(path, tars, is_nested=False, class_names=class_names)
    if len(tars) > 1 or _is_grouped(names) or image_key or label_key:
        _refuse(path, "WebDataset", split=split if is_single else "", labels=labels)
        return WebDatasetSource(path, tars, image_key=image_key, label_key=label_key, class_names=class_names)
    return ImageTarSource(path, tars[0], split=split if is_single else "", labels=labels, class_names=class_names)


def archives_of(path: Path) -> bool:
    """Returns whether ``open_tars`` is what a file or a folder needs; compressed tars count, so that it refuses them.

    Raises:
        OSError: it cannot be read.
    """
    if path.is_dir():
        return any(file.suffix == ".tar" for file in path.iterdir())
    return ".tar" in path.suffixes[-2:] or path.suffix in (".tgz", ".txz", ".tbz2")


def _is_grouped(names: list[str]) -> bool:
    """Returns whether members go together by name: an image and something else, or the same images for each."""
    from maestri.shards.sources.webdataset_tars import is_image, split_name

    groups: dict[str, set[str]] = {}
    for name in names:
        key, extension = split_name(name)
        if key:
            groups.setdefault(key, set()).add(extension)
    with_images = {key: group for key, group in groups.items() if any(is_image(extension) for extension in group)}
    if any(not is_image(extension) for group in with_images.values() for extension in group):
        return True
    kinds = {frozenset(group) for group in list(with_images.values())[:-1]}  # the last may go on beyond what was seen
    if len(kinds) != 1:
        return False
    kind = kinds.pop()
    return len(kind) > 1 and sum("." not in extension for extension in kind) == 1  # else as img.1.jpg and img.2.jpg


def _refuse(path: Path, kind: str, **options: object) -> None:
    for name, value in options.items():
        if value:
            raise ShardError(f"{path} is {kind}, and --{name.removesuffix('_key')} is not for those; leave it out")
