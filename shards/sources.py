"""What can be converted: a folder of images, or an idx file."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from maestri.shards.errors import ShardError


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """Everything about a source but the images themselves, in its own order."""

    keys: tuple[str, ...]
    """Unique; ``/`` separates folders, dots and blanks are escaped."""
    sizes: NDArray[np.int64]
    """Bytes of each image in the source; ``sample``."""
    labels: NDArray[np.int32]
    """Positions in ``class_names``; −1 for none; ``sample``."""
    class_names: tuple[str, ...]
    """Empty without labels."""
    content: str = ""
    """SHA-256 of the images themselves, where the source is read whole anyway."""

    def digest(self) -> str:
        """Returns a SHA-256 over all of it."""
        state = hashlib.sha256("\0".join(self.keys).encode())
        state.update("\0".join(self.class_names).encode("utf-8", "surrogateescape") + b"\0")
        state.update(np.ascontiguousarray(self.sizes, "<i8").tobytes())
        state.update(np.ascontiguousarray(self.labels, "<i4").tobytes())
        state.update(self.content.encode())
        return state.hexdigest()


class Source(Protocol):
    """Something that can be converted; pickled into worker processes."""

    @property
    def kind(self) -> str:
        """Its name in the manifest."""
        ...

    @property
    def path(self) -> Path:
        """Where it is."""
        ...

    def listing(self) -> Listing:
        """Returns the listing."""
        ...

    def load(self, sample: int) -> bytes | NDArray[np.uint8]:
        """Returns an image file's bytes, or grey pixels ``height width``."""
        ...

    def name(self, sample: int) -> str:
        """Returns what a user calls the image: its path in the source, or its number."""
        ...


def open_source(path: Path, *, split: str = "") -> Source:
    """Returns the source at a path.

    Args:
        path: a folder of images, a folder with idx3 files, or an idx3 file.
        split: which of the folder's subfolders or idx3 files; ``test`` also finds MNIST's ``t10k``.

    Raises:
        ShardError: there is nothing, or nothing that can be converted.
    """
    from maestri.shards.idx_file import IdxSource, idx_images_in, is_idx
    from maestri.shards.image_folder import FolderSource

    try:
        if path.is_dir():
            images = idx_images_in(path, split)
            if images is not None:
                return IdxSource(images)
            if split and not (path / split).is_dir():
                raise ShardError(f"{path} has neither a folder nor an idx3 file of split '{split}'")
            return FolderSource(path / split)
        if not path.exists():
            raise ShardError(f"there is no {path}")
        if is_idx(path):
            if split:
                raise ShardError(f"--split is for folders, and {path} is a file; leave it out")
            return IdxSource(path)
    except OSError as error:
        raise ShardError(f"cannot read the source: {error.strerror}: {error.filename}") from None
    raise ShardError(f"{path} is neither a folder of images nor an idx3 file (such as train-images-idx3-ubyte.gz)")
