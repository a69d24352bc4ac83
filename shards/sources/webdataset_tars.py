"""WebDataset tars that others made: members of one name are a sample, extensions tell them apart."""

import logging
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from maestri.shards.errors import ShardError
from maestri.shards.keys import are_unique
from maestri.shards.listing import Listing, Strings, StringsDraft
from maestri.shards.sources.class_tars import cleaned, listing_of
from maestri.shards.sources.file_patterns import short_names
from maestri.shards.sources.image_folder import IMAGE_SUFFIXES
from maestri.shards.sources.labels import Labels
from maestri.shards.sources.tar_archives import TarImages
from maestri.shards.sources.tar_index import tar_members
from maestri.shards.sources.tar_labels import LABEL_MEMBERS, label_among

_METADATA = re.compile(r"__[^/]*__(/|$)")

_logger = logging.getLogger(__name__)

Part = tuple[str, int, int]
"""Extension, offset, size."""


class WebDatasetSource(TarImages):
    """WebDataset tars; a sample's image and label are found by their extensions."""

    kind = "tar"

    def __init__(
        self,
        path: Path,
        tars: Sequence[Path],
        *,
        image_key: str = "",
        label_key: str = "",
        class_names: Sequence[str] = (),
    ) -> None:
        """Takes the tars.

        Args:
            path: what the user gave.
            tars: what it stands for, in the order of the listing.
            image_key: the image's extension (``jpg``, ``left.png``), where samples have several images.
            label_key: the label's extension (``cls``), or a key of a JSON member (``label``, ``meta.json:label``).
            class_names: of all classes, where they are known.
        """
        super().__init__(path, tars)
        self._image_key = image_key.lower().removeprefix(".")
        self._label_key = label_key.removeprefix(".")
        self._class_names = tuple(class_names)

    def listing(self) -> Listing:
        """Returns the listing, in the tars' order; labels are read, images are not.

        Raises:
            ShardError: a tar is damaged, a sample's members are apart, its image is not clear or its label is none.
        """
        shown = short_names(self.files)
        ignored, unused = Counter[str](), Counter[str]()
        labels = Labels(self._class_names)
        files, names, places = StringsDraft(), StringsDraft(), array("q")
        per_tar: list[int] = []
        without_image: list[str] = []
        without_label: list[str] = []
        for number, tar in enumerate(self.files):
            before = len(names)
            for key, parts in samples_in(tar, ignored):
                sample = f"{shown[number]}:{key}"
                image = self._image_among(parts, sample)
                if image is None:
                    without_image.append(sample)
                    continue
                value, used = self._label_among(number, parts, sample)
                if value is None:
                    without_label.append(sample)
                labels.add(value, sample)
                unused.update(extension for extension, _, _ in parts if extension not in (image[0], used))
                files.add(f"{key}.jpg")
                names.add(f"{sample}.{image[0]}")
                places.extend((number, *image[1:]))
            per_tar.append(len(names) - before)
        self.close()  # labels were read
        self._warn(len(names), ignored, unused, without_image, without_label)
        if not len(names):
            raise ShardError(f"no images in {self.path}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
        found = files.strings()
        if not are_unique(found):  # tars that each count from 0
            tars = (name for name, count in zip(shown, per_tar, strict=True) for _ in range(count))
            found = Strings.of(f"{tar.removesuffix('.tar')}/{file}" for tar, file in zip(tars, found, strict=True))
            if not are_unique(found):
                raise ShardError(f"{self.path}: a tar beside a folder of its name holds the same keys; rename one")
        table = np.frombuffer(places, np.int64).reshape(-1, 3)
        return listing_of(found, names.strings(), table, labels.columns())

    def _image_among(self, parts: list[Part], sample: str) -> Part | None:
        if self._image_key:
            return next((part for part in parts if part[0] == self._image_key), None)
        images = [part for part in parts if is_image(part[0])]
        if len(images) > 1:
            plain = [part for part in images if "." not in part[0]]  # x.jpg counts, x.seg.png beside it does not
            images = plain if len(plain) == 1 else images
        if len(images) > 1:
            extensions = [extension for extension, _, _ in images]
            hint = " or ".join(f"--image {extension}" for extension in extensions)
            raise ShardError(f"{sample} has {len(images)} images: {', '.join(extensions)}; say {hint}")
        return images[0] if images else None

    def _label_among(self, number: int, parts: list[Part], sample: str) -> tuple[object, str]:
        """Returns the label as it is written, None if there is none, and the extension of its member."""
        by_extension = {part[0]: part for part in parts}
        return label_among(
            {extension: size for extension, _, size in parts},
            lambda extension: self._pread(number, *by_extension[extension][1:]),
            self._label_key,
            sample,
        )

    def _warn(
        self,
        count: int,
        ignored: Counter[str],
        unused: Counter[str],
        without_image: list[str],
        without_label: list[str],
    ) -> None:
        if ignored:
            kinds = ", ".join(f"{times} {kind}" for kind, times in ignored.most_common(5))
            _logger.warning(
                "%d members of %s belong to no sample and are left out: %s", ignored.total(), self.path, kinds
            )
        if unused:
            kinds = ", ".join(f"{times} {extension}" for extension, times in unused.most_common(5))
            _logger.warning("%d members beside the images of %s are left out: %s", unused.total(), self.path, kinds)
        if without_image:
            text = "%d samples of %s have no image and are left out, such as %s"
            _logger.warning(text, len(without_image), self.path, without_image[0])
        if without_label and len(without_label) == count:
            _logger.warning("%s has no labels; looked for %s", self.path, self._label_key or ", ".join(LABEL_MEMBERS))
        elif without_label:
            _logger.warning(
                "%d samples of %s have no label, such as %s", len(without_label), self.path, without_label[0]
            )


def split_name(name: str) -> tuple[str, str]:
    """Returns a member's key and its extension in lower case; both are empty for what belongs to no sample."""
    name = cleaned(name)
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    if dot <= slash or _METADATA.match(name):
        return "", ""
    return name[:dot], name[dot + 1 :].lower()


def is_image(extension: str) -> bool:
    """Returns whether an extension ends as those of images do (``jpg``, ``left.png``)."""
    return f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES


def samples_in(tar: Path, ignored: Counter[str]) -> Iterator[tuple[str, list[Part]]]:
    """Yields key and members of each sample of a tar.

    Args:
        tar: the tar.
        ignored: counts members that belong to no sample, by kind.

    Raises:
        ShardError: the tar is damaged, or members of a sample are apart or there twice.
    """
    seen: set[str] = set()
    current = ""
    parts: list[Part] = []
    for name, offset, size in tar_members(tar, ignored):
        key, extension = split_name(name)
        if not key:
            ignored["metadata" if name.startswith("__") else "without key"] += 1
            continue
        if key != current:
            if parts:
                yield current, parts
            if key in seen:
                raise ShardError(
                    f"{tar}: members of sample {key} are apart, the second part at byte {offset}; "
                    "WebDataset needs them side by side: pack it anew by tar --sort=name"
                )
            seen.add(key)
            current, parts = key, []
        elif any(extension == other for other, _, _ in parts):
            raise ShardError(f"{tar}: {key}.{extension} is in it twice, the second time at byte {offset}")
        parts.append((extension, offset, size))
    if parts:
        yield current, parts
