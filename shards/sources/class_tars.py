"""Tars of images whose classes are tars or folders, as ImageNet is downloaded; nothing is unpacked."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from maestri.shards.errors import ShardError
from maestri.shards.keys import unique_keys
from maestri.shards.listing import Listing, Strings
from maestri.shards.sources.image_folder import IMAGE_SUFFIXES, SPLIT_NAMES
from maestri.shards.sources.label_file import label_columns
from maestri.shards.sources.labels import LabelColumns, Labels
from maestri.shards.sources.tar_archives import TarImages
from maestri.shards.sources.tar_index import Member, tar_members

_VALIDATION = "ILSVRC2012_val_"

_logger = logging.getLogger(__name__)


class ClassTarsSource(TarImages):
    """A tar for each class, called like it; all of them in one more tar, as in ``ILSVRC2012_img_train.tar``, or not."""

    kind = "imagenet"

    def __init__(self, path: Path, tars: Sequence[Path], *, is_nested: bool, class_names: Sequence[str] = ()) -> None:
        """Takes the tar around the class tars, or the class tars."""
        super().__init__(path, tars)
        self._is_nested = is_nested
        self._class_names = tuple(class_names)

    def listing(self) -> Listing:
        """Returns the listing: classes are the tars' names, sorted; images are in the order of class and name.

        Raises:
            ShardError: a tar is damaged, a class is there twice, or there are no images.
        """
        ignored = Counter[str]()
        found: list[tuple[str, int, int, int]] = []
        empty: list[str] = []
        classes: dict[str, str] = {}
        for number, (tar, name, start, end) in enumerate(self._archives(ignored)):
            folder = PurePosixPath(name).stem
            if folder in classes:
                raise ShardError(f"{self.path}: {name} and {classes[folder]} are both class {folder}")
            classes[folder] = name
            before = len(found)
            place = 0 if self._is_nested else number
            for member, offset, size in images_among(tar_members(tar, ignored, start=start, end=end), ignored):
                found.append((f"{folder}/{member}", place, offset, size))
            if len(found) == before:
                empty.append(folder)
        warn_of(ignored, self.path)
        if empty:
            _logger.warning("%d class tars have no images, such as %s", len(empty), empty[0])
        if not found:
            raise ShardError(f"no images in {self.path}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
        found.sort()
        files = [file for file, *_ in found]
        check_once(self.path, files)
        labels = Labels(self._class_names or sorted(classes))
        for file in files:
            labels.add(file.split("/", 1)[0], file)
        around = f"{self.files[0].name}:" if self._is_nested else ""
        parts = (file.partition("/") for file in files)
        names = (f"{around}{classes[folder]}:{member}" for folder, _, member in parts)
        return listing_of(files, names, [place for _, *place in found], labels.columns())

    def _archives(self, ignored: Counter[str]) -> Iterator[tuple[Path, str, int, int | None]]:
        """Yields each class tar: the file it is in, its name, where it starts and where it ends."""
        if not self._is_nested:
            for tar in self.files:
                yield tar, tar.name, 0, None
            return
        for name, offset, size in tar_members(self.files[0], ignored):
            if name.lower().endswith(".tar"):
                yield self.files[0], PurePosixPath(name).name, offset, offset + size
            else:
                ignored[PurePosixPath(name).suffix.lower() or "without extension"] += 1


class ImageTarSource(TarImages):
    """A tar of images: its folders are classes, or a label file tells them, as for ``ILSVRC2012_img_val.tar``."""

    kind = "image-tar"

    def __init__(
        self,
        path: Path,
        tar: Path,
        *,
        split: str = "",
        labels: Path | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        """Takes the tar, and where its labels are if not in the names of its folders."""
        super().__init__(path, (tar,))
        self._split = split
        self._label_file = labels
        self._class_names = tuple(class_names)

    def listing(self) -> Listing:
        """Returns the listing, sorted by path; folders that are around all others are no classes.

        Raises:
            ShardError: the tar is damaged, has no images, has some beside class folders, or its label file is wrong.
        """
        ignored = Counter[str]()
        folders: set[str] = set()
        tar = self.files[0]
        found = sorted(images_among(tar_members(tar, ignored, folders=folders), ignored))
        if not found:
            raise ShardError(f"no images in {self.path}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
        if ignored[".cls"]:
            raise ShardError(f"{self.path} has .cls members, but not beside their images, where WebDataset has them")
        warn_of(ignored, self.path)
        root = self._root([name for name, _, _ in found])
        found = [member for member in found if member[0].startswith(root)]
        files = [name.removeprefix(root) for name, _, _ in found]
        check_once(self.path, files)
        columns = self._labels(files, {cleaned(folder) for folder in folders}, root)
        places = [[0, offset, size] for _, offset, size in found]
        return listing_of(files, (f"{tar.name}:{name}" for name, _, _ in found), places, columns)

    def _root(self, names: list[str]) -> str:
        """Returns the folders that are no classes: around everything, or the split's."""
        root = ""
        while True:
            tops = {name.removeprefix(root).split("/", 1)[0] + "/" for name in names}
            is_deep = all("/" in name.removeprefix(root).partition("/")[2] for name in names)
            if {top.rstrip("/").lower() for top in tops} <= SPLIT_NAMES and all(
                "/" in name.removeprefix(root) for name in names
            ):
                return root + self._chosen_split(tops)
            if len(tops) > 1 or not is_deep:
                break
            root += tops.pop()
        if self._split:
            raise ShardError(f"{self.path} has no folder of split '{self._split}'")
        return root

    def _chosen_split(self, tops: set[str]) -> str:
        chosen = f"{self._split}/" if self._split else next(iter(tops))
        if chosen not in tops or (len(tops) > 1 and not self._split):
            hint = " or ".join(f"--split {top.rstrip('/')}" for top in sorted(tops))
            raise ShardError(f"{self.path} holds splits, not classes; say {hint}")
        return chosen

    def _labels(self, files: list[str], folders: set[str], root: str) -> LabelColumns:
        if self._label_file is not None:
            return label_columns(self._label_file, files, class_names=self._class_names)
        tops = [file.split("/", 1)[0] if "/" in file else "" for file in files]
        used = set(tops) - {""}
        if used and "" in tops:
            stray = files[tops.index("")]
            raise ShardError(f"{self.path} has images beside class folders, the first is {root}{stray}")
        below = {folder.removeprefix(root).split("/", 1)[0] for folder in folders if folder.startswith(root)}
        empty = {folder for folder in below if not folder.startswith(".")} - used - {""}
        if used and empty:
            _logger.warning("%d class folders have no images, such as %s", len(empty), min(empty))
        if not used and PurePosixPath(files[0]).name.startswith(_VALIDATION):
            _logger.warning(
                "%s has no labels: they are in ILSVRC2012_devkit_t12.tar.gz or Kaggle's LOC_val_solution.csv;"
                " name one by --labels",
                self.path,
            )
        labels = Labels((self._class_names or sorted(used | empty)) if used else ())
        for file, top in zip(files, tops, strict=True):
            labels.add(top or None, file)
        return labels.columns()


def images_among(members: Iterable[Member], ignored: Counter[str]) -> Iterator[Member]:
    """Yields members whose names are those of images, with cleaned names; counts others by extension."""
    suffixes = tuple(IMAGE_SUFFIXES)
    for name, offset, size in members:
        name = cleaned(name)
        base = name.rpartition("/")[2]
        if base.startswith(".") or name.startswith("__MACOSX/"):
            ignored["hidden"] += 1
        elif base.lower().endswith(suffixes):
            yield name, offset, size
        else:
            ignored[PurePosixPath(base).suffix.lower() or "without extension"] += 1


def cleaned(name: str) -> str:
    """Returns a member's name as a relative path; ``..`` stays, as text, and is escaped in keys."""
    if name[:1] in "./" or "//" in name or "/./" in name:
        return "/".join(part for part in name.split("/") if part not in ("", "."))
    return name


def check_once(path: Path, files: Sequence[str]) -> None:
    """Raises a ShardError if sorted names are not unique."""
    for first, second in zip(files, files[1:], strict=False):
        if first == second:
            raise ShardError(f"{path}: {first} is in it twice; pack it anew")


def warn_of(ignored: Counter[str], path: Path) -> None:
    """Logs what was left out, by kind."""
    if ignored:
        kinds = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(5))
        _logger.warning("%d members of %s are no images and left out: %s", ignored.total(), path, kinds)


def listing_of(
    files: Sequence[str] | Strings,
    names: Iterable[str] | Strings,
    places: Sequence[Sequence[int]] | NDArray[np.int64],
    columns: LabelColumns,
) -> Listing:
    """Returns the listing of images in tars: paths with extension, what users call them, and tar, offset and size."""
    table = np.array(places, np.int64).reshape(-1, 3)
    return Listing(
        keys=Strings.of(unique_keys(files)),
        names=names if isinstance(names, Strings) else Strings.of(names),
        places=table,
        sizes=table[:, 2].copy(),
        labels=columns.labels,
        label_ends=columns.label_ends,
        label_values=columns.label_values,
        class_names=columns.class_names,
    )
