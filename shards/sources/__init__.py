"""What can be converted: a folder of images, or an idx file."""

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from maestri.shards.errors import ShardError
from maestri.shards.listing import Listing


class Source(Protocol):
    """Something that can be converted.

    It is pickled into worker processes, so it is small: what belongs to single images is in the listing, of which a
    worker gets the part that it needs.  Four more methods are optional.  ``stage(folder)`` comes before ``listing``
    where images cannot be read at random: it lays them out in a folder that lasts as long as the conversion, and goes
    on where it was interrupted; ``bytes_to_stage(folder)`` returns how much that still is, and ``class_names()`` the
    listing's, which need no staging.  ``facts(place)`` returns what the bytes of a kept image don't tell: its
    ``stored`` code and orientation.
    """

    @property
    def kind(self) -> str:
        """Its name in the manifest."""
        ...

    @property
    def path(self) -> Path:
        """What the user gave."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The files or folders that it reads."""
        ...

    def listing(self) -> Listing:
        """Returns the listing.

        Raises:
            ShardError: there are no images, or the source is damaged.
        """
        ...

    def load(self, name: str, place: NDArray[np.int64]) -> bytes | NDArray[np.uint8]:
        """Returns an image file's bytes, or pixels: grey ``height width`` or RGB ``height width 3``.

        Args:
            name: the sample's in the listing.
            place: the sample's in the listing.

        Raises:
            BadImage: this image is damaged in the source.
            OSError: the source cannot be read; the error names the file.
        """
        ...


def open_source(
    path: Path,
    *,
    split: str = "",
    labels: Path | None = None,
    image: str = "",
    label: str = "",
    class_names: tuple[str, ...] = (),
) -> Source:
    """Returns the source at a path.

    Args:
        path: a folder of images; an idx3 file or a folder of them; WebDataset tars or ImageNet's (one, a folder, a
            pattern such as ``train-{000..146}.tar``); parquet files; a ``.beton``; a set of shards.
        split: which of the folder's subfolders or idx3 files; ``test`` also finds MNIST's ``t10k``.
        labels: file with labels, for images that come without.
        image: which tar member, column or field holds the image.
        label: which tar member, json key, column or field holds the label.
        class_names: of all classes, where they are known: what labels that are numbers are positions in.

    Raises:
        ShardError: there is nothing, or nothing that can be converted, or an option does not apply.
    """
    try:
        source, used = _open(path, split=split, labels=labels, image=image, label=label, class_names=class_names)
    except OSError as error:
        raise ShardError(f"cannot read the source: {error.strerror}: {error.filename}") from None
    given = {"--split": split, "--labels": labels, "--image": image, "--label": label}
    for flag, value in given.items():
        if value and flag not in used:
            raise ShardError(f"{flag} means nothing for {path}, which is {_KINDS[source.kind]}; leave it out")
    return source


_KINDS = {
    "folder": "a folder of images",
    "idx": "an idx3 file",
    "tar": "WebDataset tars",
    "image-tar": "a tar of images",
    "imagenet": "class tars, as ImageNet has them",
    "parquet": "parquet files",
    "beton": "a .beton file",
    "shards": "a set of shards",
}
_PATTERNS = {".tar": "tar", ".parquet": "parquet"}


def _open(
    path: Path, *, split: str, labels: Path | None, image: str, label: str, class_names: tuple[str, ...]
) -> tuple[Source, set[str]]:
    """Returns the source and the options that mean something for it."""
    from maestri.shards.manifest import FILE_NAME
    from maestri.shards.sources.beton import BetonSource
    from maestri.shards.sources.file_patterns import is_pattern, kind_of
    from maestri.shards.sources.idx_file import IdxSource, idx_images_in, is_idx
    from maestri.shards.sources.image_folder import FolderSource
    from maestri.shards.sources.parquet import ParquetSource
    from maestri.shards.sources.shard_set import ShardSetSource
    from maestri.shards.sources.tar_archives import archives_of, open_tars

    is_many = not kind_of(path) and is_pattern(path)
    if not kind_of(path) and not is_many:
        raise ShardError(f"there is no {path}")
    fields = {"--image", "--label"}
    if kind_of(path) == "folder" and (path / FILE_NAME).is_file():
        return ShardSetSource(path), set()
    if is_many and path.suffix not in _PATTERNS:
        raise ShardError(f"{path} stands for files that are neither .tar nor .parquet")
    if _is_parquet(path):
        parquet = ParquetSource(path, split=split, image_column=image, label_column=label, class_names=class_names)
        return parquet, {"--split", *fields}
    if kind_of(path) == "folder":
        images = idx_images_in(path, split)
        if images is not None:
            return IdxSource(images), {"--split"}
    if is_many or archives_of(path):
        tars = open_tars(path, split=split, labels=labels, image_key=image, label_key=label, class_names=class_names)
        return tars, {"--split", "--labels", *fields}  # open_tars refuses those that don't go with the kind
    if path.is_dir():
        if split and not (path / split).is_dir():
            raise ShardError(f"{path} has neither a folder nor an idx3 file of split '{split}'")
        return FolderSource(path / split, labels=labels, class_names=class_names), {"--split", "--labels"}
    if path.suffix == ".beton":
        return BetonSource(path, image_field=image or None, label_field=label or None), fields
    if is_idx(path):
        return IdxSource(path), set()
    raise ShardError(
        f"{path} is nothing that can be converted: expected a folder of images, idx3 files (such as "
        "train-images-idx3-ubyte.gz), tars, parquet files, a .beton or a set of shards"
    )


def _is_parquet(path: Path) -> bool:
    from maestri.shards.sources.file_patterns import kind_of

    if kind_of(path) != "folder":
        return path.suffix == ".parquet"
    folders = [folder for folder in (path, path / "data") if folder.is_dir()]
    return any(entry.suffix == ".parquet" for folder in folders for entry in folder.iterdir())
