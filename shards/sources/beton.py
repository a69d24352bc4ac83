"""A file of FFCV's (``.beton``) as a source: its own, or ours."""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maestri.shards.beton_fields import image_field, label_field, read_labels
from maestri.shards.beton_format import Beton
from maestri.shards.beton_rows import labels_of, our_block
from maestri.shards.errors import ShardError
from maestri.shards.handles import Handles
from maestri.shards.images import BadImage, require_size
from maestri.shards.listing import Listing, Strings


class BetonSource:
    """A ``.beton`` with an image field and perhaps a label: an integer, or an array with a place for each class."""

    kind = "beton"

    def __init__(self, path: Path, *, image_field: str | None = None, label_field: str | None = None) -> None:
        """Takes the file and which of its fields count; it is read when first needed.

        Args:
            path: of the file.
            image_field: name; by default the only ``RGBImageField``.
            label_field: name, empty for none; by default ``label`` or ``labels``, else the only ``IntField``.
        """
        self.path = path
        self.files = (path,)
        self._image_field, self._label_field = image_field, label_field
        self._handles: Handles | None = None

    def __getstate__(self) -> dict[str, object]:
        """Leaves the open file out: a worker process opens it itself."""
        return self.__dict__ | {"_handles": None}

    def listing(self) -> Listing:
        """Returns the listing.

        Keys are the numbers of rows, and classes ``0`` … up to the largest label or the length of the arrays; in a file
        of ours they are those that were written.

        Raises:
            ShardError: the file is damaged, has no images, or its fields are not those asked for.
            OSError: it cannot be read.
        """
        beton = Beton(self.path)
        if not beton.num_samples:
            raise ShardError(f"{self.path} holds no images")
        images = beton.images(image_field(beton, self._image_field))
        labels = read_labels(beton, label_field(beton, self._label_field))
        width = len(str(beton.num_samples - 1))
        keys = Strings.of(f"{row:0{width}d}" for row in range(beton.num_samples))
        class_names = tuple(str(label) for label in range(labels.num_classes))
        block = our_block(beton)
        if block is not None:
            keys, labels = block.keys, labels_of(block)
            class_names = block.class_names or class_names
            if labels.num_classes > len(class_names):
                raise ShardError(f"{self.path}: {len(class_names)} class names for {labels.num_classes} classes")
        shapes = np.where(images.is_raw, images.heights << 16 | images.widths, 0)
        return Listing(
            keys=keys,
            names=Strings.of(f"{self.path.name}[{row}]" for row in range(beton.num_samples)),
            places=np.stack([images.offsets, images.sizes, shapes], 1),
            sizes=images.sizes,
            labels=labels.first,
            label_ends=labels.ends,
            label_values=labels.values,
            class_names=class_names,
            content=hashlib.sha256(beton.metadata.tobytes()).hexdigest(),
        )

    def load(self, name: str, place: NDArray[np.int64]) -> bytes | NDArray[np.uint8]:
        """Returns a JPEG, or the pixels ``height width 3`` where the row holds those.

        Raises:
            BadImage: it is too large to be an image, or cut short.
            OSError: the file cannot be read.
        """
        offset, size, shape = place.tolist()
        require_size(size)
        if self._handles is None:
            self._handles = Handles([self.path])
        data = self._handles.pread(0, size, offset)
        if len(data) != size:
            raise BadImage(f"cut short: {len(data)} of {size} bytes")
        if not shape:
            return data
        return np.frombuffer(data, np.uint8).reshape(shape >> 16, shape & 0xFFFF, 3)
