"""WebDataset tars that others made: members of one name are a sample, extensions tell them apart."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from maestri.shards.errors import ShardError
from maestri.shards.listing import Listing
from maestri.shards.sources.class_tars import cleaned, listing_of
from maestri.shards.sources.file_patterns import short_names
from maestri.shards.sources.image_folder import IMAGE_SUFFIXES
from maestri.shards.sources.labels import Labels
from maestri.shards.sources.tar_archives import TarImages
from maestri.shards.sources.tar_index import tar_members

LABEL_MEMBERS = ("cls", "index", "json")
"""Extensions that hold labels, in the order in which they are looked for."""
JSON_KEYS = ("label", "labels", "cls", "class", "target")
"""Where a JSON member has its labels, in the order in which they are looked for."""
MAX_LABEL = 1 << 20
"""Bytes of a member with labels."""
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
        keys: list[str] = []
        names: list[str] = []
        places: list[tuple[int, int, int]] = []
        per_tar: list[int] = []
        without_image: list[str] = []
        without_label: list[str] = []
        for number, tar in enumerate(self.files):
            before = len(keys)
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
                keys.append(key)
                names.append(f"{sample}.{image[0]}")
                places.append((number, *image[1:]))
            per_tar.append(len(keys) - before)
        self.close()  # labels were read
        self._warn(len(keys), ignored, unused, without_image, without_label)
        if not keys:
            raise ShardError(f"no images in {self.path}; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
        if len(set(keys)) < len(keys):  # tars that each count from 0
            stems = [name.removesuffix(".tar") for name in shown for _ in range(per_tar[shown.index(name)])]
            keys = [f"{stem}/{key}" for stem, key in zip(stems, keys, strict=True)]
            if len(set(keys)) < len(keys):
                raise ShardError(f"{self.path}: a tar beside a folder of its name holds the same keys; rename one")
        return listing_of([f"{key}.jpg" for key in keys], names, places, labels.columns())

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
        member, _, key = self._label_key.partition(":")
        members: list[tuple[str, tuple[str, ...]]]
        if not self._label_key:
            members = [(extension, JSON_KEYS) for extension in LABEL_MEMBERS]
        elif key:
            members = [(member.lower(), (key,))]
        else:
            members = [(member.lower(), JSON_KEYS), ("json", (member,))]
        for extension, json_keys in members:
            if extension not in by_extension:
                continue
            _, offset, size = by_extension[extension]
            if size > MAX_LABEL:
                raise ShardError(f"{sample}.{extension} should hold a label and has {size} bytes")
            where = f"{sample}.{extension}"
            value = _label_in(self._pread(number, offset, size), extension, json_keys, where)
            if value is not None:
                return value, extension
        return None, ""

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


def _label_in(data: bytes, extension: str, json_keys: tuple[str, ...], where: str) -> object:
    if extension.rpartition(".")[2] == "json":
        try:
            fields: Any = json.loads(data)
        except (ValueError, RecursionError):
            raise ShardError(f"{where} is no JSON: {data[:40]!a}") from None
        if not isinstance(fields, dict):
            return fields
        return next((fields[key] for key in json_keys if fields.get(key) is not None), None)
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        raise ShardError(f"{where} should hold a label and is no text: {data[:40]!a}") from None
    if not text:
        return None
    digits = text.removeprefix("-")
    if digits.isascii() and digits.isdigit() and len(digits) < 20:
        return int(text)
    return text
