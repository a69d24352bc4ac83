"""A folder of images as a source."""

import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maestri.shards.errors import ShardError
from maestri.shards.images import BadImage, require_size
from maestri.shards.keys import unique_keys
from maestri.shards.listing import Listing, Strings
from maestri.shards.sources.label_file import label_columns

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
    + (".jp2", ".avif", ".tga")
)
"""Files of a folder that are taken for images, whatever is in them; others are left alone."""
SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))

_logger = logging.getLogger(__name__)


class FolderSource:
    """A folder of images: a folder for each class, at any depth below it, or flat and without labels."""

    kind = "folder"

    def __init__(self, path: Path, *, labels: Path | None = None, class_names: tuple[str, ...] = ()) -> None:
        """Takes the folder; ``listing`` looks into it.

        Args:
            path: of the folder.
            labels: file with the images' labels, instead of class folders.
            class_names: of all classes, for a file in which labels are numbers.
        """
        self.path = path
        self.files = (path,)
        self._label_file = labels
        self._all_classes = class_names

    def listing(self) -> Listing:
        """Returns the listing: files are sorted by path; classes are the first-level folders, sorted.

        A first-level folder without images is a class too, so that two splits of a data set number theirs alike.

        Raises:
            ShardError: there are no images, or some stand beside class folders.
        """
        found = self._scan()
        if not found:
            raise ShardError(f"no images in {self.path}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
        files = [name for name, _ in found]
        sizes = np.fromiter((size for _, size in found), np.int64, len(found))
        del found
        columns = Listing(
            keys=Strings.of(unique_keys(files)),
            names=Strings.of(files),
            places=np.zeros((len(files), 3), np.int64),
            sizes=sizes,
            labels=np.full(len(files), -1, np.int32),
            class_names=(),
        )
        if self._label_file is not None:
            labels = label_columns(self._label_file, files, class_names=self._all_classes)
            return replace(
                columns,
                labels=labels.labels,
                label_ends=labels.label_ends,
                label_values=labels.label_values,
                class_names=labels.class_names,
            )
        class_names = self._class_names(files)
        number = {name: label for label, name in enumerate(class_names)}
        tops = np.fromiter((number.get(_top(name), -1) for name in files), np.int32, len(files))
        return replace(columns, labels=tops, class_names=class_names)

    def load(self, name: str, place: NDArray[np.int64]) -> bytes:
        """Returns the bytes of the file with this path below the folder.

        Raises:
            BadImage: it is too large to be an image, or no regular file any more.
            OSError: it cannot be read; the error names it.
        """
        path = self.path / name
        try:
            with open(path, "rb", buffering=0, opener=_open_at_once) as file:  # noqa: PTH123  # Path.open takes no opener
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise BadImage("no regular file")
                require_size(status.st_size)
                return file.read()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None  # a failed read names no file

    def _class_names(self, files: list[str]) -> tuple[str, ...]:
        tops = {_top(name) for name in files}
        used = tops - {""}
        if not used:
            return ()
        if "" in tops:
            stray = next(name for name in files if not _top(name))
            raise ShardError(
                f"{self.path} has images beside class folders, the first is {stray}; move it into a class or away"
            )
        if used <= SPLIT_NAMES:
            some = sorted(used)[0]
            raise ShardError(
                f"{self.path} holds splits ({', '.join(sorted(used))}), not classes; convert one by --split {some}"
            )
        folders = {path.name for path in self.path.iterdir() if path.is_dir() and not path.name.startswith(".")}
        empty = sorted(folders - used)
        if empty:
            _logger.warning("%d class folders have no images, such as %s", len(empty), empty[0])
        return tuple(sorted(folders))

    def _scan(self) -> list[tuple[str, int]]:
        ignored: Counter[str] = Counter()
        found = []
        try:
            for name, entry in _files_below(str(self.path), "", ()):
                stem, dot, extension = entry.name.rpartition(".")
                suffix = dot + extension.lower() if stem and extension else ""
                if suffix not in IMAGE_SUFFIXES:
                    ignored[suffix or entry.name] += 1
                elif stat.S_ISREG((status := entry.stat()).st_mode):  # which fails for a link that leads nowhere
                    found.append((name, status.st_size))
                else:
                    ignored["pipes and devices"] += 1  # reading one would never end
        except OSError as error:
            raise ShardError(f"cannot read the source: {error.strerror}: {error.filename}") from None
        if found and ignored:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in ignored.most_common(5))
            _logger.warning("%d files of %s are no images and left out: %s", ignored.total(), self.path, kinds)
        found.sort()
        return found


def _top(name: str) -> str:
    """Returns the first folder of a path, empty for a file without one."""
    return name.partition("/")[0] if "/" in name else ""


def _open_at_once(path: str, flags: int) -> int:
    """Opens a file; of a pipe that stands there now, it does not wait for the other end."""
    return os.open(path, flags | os.O_NONBLOCK)


def _files_below(folder: str, name: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yields files at any depth, in no order; follows links, but never into a folder that it is inside of.

    Args:
        folder: where to look.
        name: of the folder below the source, with a slash behind it; empty for the source itself.
        above: devices and inodes of the folders that it is inside of.
    """
    status = os.stat(folder)  # noqa: PTH116  # twice as fast as Path on a million files
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _files_below(entry.path, f"{name}{entry.name}/", (*above, here))
            else:
                yield name + entry.name, entry
