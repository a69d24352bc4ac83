"""What is in a shard, from the shard alone: the rows of an index, and what cannot be one."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from maestri.shards import beton_block
from maestri.shards.beton_fields import image_field, label_field, read_labels
from maestri.shards.beton_format import Beton
from maestri.shards.beton_rows import our_block
from maestri.shards.errors import ShardError
from maestri.shards.images import BadImage, StoredImage, require_size, store
from maestri.shards.jpeg import read_header
from maestri.shards.parallel import Count
from maestri.shards.rows import Rows, Sample
from maestri.shards.tar_samples import dali_index_of, groups_of, key_of, label_of

_CHUNK = 1 << 22
_PNG = b"\x89PNG"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanTask:
    """One shard to look into."""

    path: Path
    """A tar, or a ``.beton``."""
    check: Literal["decode", "header"]
    """``decode`` decodes every image once; ``header`` only parses the header."""
    is_ours: bool = False
    """Made by ``convert``: PNG is allowed, keys are taken as they are."""
    bad: Literal["quarantine", "fail"] = "quarantine"
    """What becomes of an image that fails the check."""
    image: str = ""
    """Which member or field holds the image, where it is not obvious."""
    label: str = ""
    """Which member, json key or field holds the label."""
    known: str = ""
    """Checksum of the file when its images were checked; if it still is that, none is decoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scanned:
    """What was found."""

    path: Path
    """Of the shard."""
    bytes: int
    """Size of the file."""
    xxh128: str
    """128-bit XXH3 checksum of the whole file, hexadecimal."""
    columns: dict[str, NDArray[Any]]
    """As ``Rows.columns``; the label columns mean nothing yet."""
    labels: list[Any]
    """As they stand in the shard: a number, a name, a list of these, or None; ``sample``."""
    bad: list[dict[str, str]]
    """``source``, ``key`` and ``reason`` of each image that is no row."""
    dali_index: str | None
    """Content of a tar's ``.idx``; None where DALI's format cannot hold the names."""
    class_names: tuple[str, ...] = ()
    """Where the shard holds them."""
    num_ignored: int = 0
    """Groups of members without an image."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def keys(self) -> list[str]:
        """Keys of the rows."""
        ends = np.cumsum(self.columns["key_bytes"]).tolist()
        data = self.columns["keys"].tobytes()
        return [data[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]


def scan(task: ScanTask, count: Count) -> Scanned:
    """Returns what is in a shard.

    Raises:
        ShardError: it is damaged as a whole, or an image is bad and none may be.
        OSError: it cannot be read.
    """
    size, checksum = _checksum(task.path, count)
    if checksum == task.known:
        task = replace(task, check="header")
    if task.path.suffix == ".beton":
        return _scan_beton(task, size, checksum, count)
    return _scan_tar(task, size, checksum, count)


def usable(data: bytes, *, check: Literal["decode", "header"], png: bool = False) -> StoredImage:
    """Returns what is to be known of an image whose bytes every decoder takes as they are.

    Args:
        data: of the image file.
        check: ``decode`` decodes it.
        png: whether it may be PNG.

    Raises:
        BadImage: it would have to be changed first, or it is damaged.
    """
    if png and data.startswith(_PNG):
        image = store(data, check=check, lossless=True)
    else:
        header = read_header(data)
        if not data:
            raise BadImage("the image is empty")
        if header is None or header.is_rgb:
            raise BadImage("no 8-bit grey or YCbCr JPEG; `maestri shards convert` makes one of it")
        if not header.has_end:
            raise BadImage(f"cut short: {len(data)} bytes without an end marker")
        image = store(data, check=check)
    if image.data != data:
        raise BadImage("no decoder takes it as it is; `maestri shards convert` makes a plain JPEG of it")
    return image


def _checksum(path: Path, count: Count) -> tuple[int, str]:
    state, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
            size += len(chunk)
            count(0, len(chunk), 0)
    return size, state.hexdigest()


class _Taken:
    """Gathers rows and what cannot be one."""

    def __init__(self, task: ScanTask, count: Count) -> None:
        self.rows = Rows()
        self.labels: list[Any] = []
        self.bad: list[dict[str, str]] = []
        self._task, self._count = task, count

    def add(
        self, handle: int, *, size: int, offset: int, key: str, name: str, label: Any, problem: str = "",
        checksum: int | None = None,
    ) -> None:  # fmt: skip
        """Takes the image at a place in the open shard, or says why not.

        Args:
            handle: of the shard.
            size: of the image, bytes.
            offset: where it starts.
            key: of the sample.
            name: of the image in the shard.
            label: of the sample.
            problem: why it cannot be taken, where that is known before it is read.
            checksum: CRC-32 that its bytes should have.
        """
        try:
            if problem:
                raise BadImage(problem)
            require_size(size)
            data = os.pread(handle, size, offset)
            if checksum is not None and crc32(data) != checksum:
                raise BadImage("its CRC-32 is wrong")
            image = usable(data, check=self._task.check, png=self._task.is_ours)
        except BadImage as error:
            source = f"{self._task.path.name}:{name}"
            if self._task.bad == "fail":
                raise ShardError(f"{source}: {error} (--bad quarantine leaves such images out)") from None
            self.bad.append({"source": source, "key": key, "reason": str(error)})
            self._count(1, 0, 1)
        else:
            self.rows.add(Sample(key=key, label=-1, image=image), offset=offset)
            self.labels.append(label)
            self._count(1, 0, 0)


def _scan_tar(task: ScanTask, size: int, checksum: str, count: Count) -> Scanned:
    groups = groups_of(task.path)
    taken = _Taken(task, count)
    num_ignored = 0
    handle = os.open(task.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for group in groups:
            image = group.image(task.image)
            if image is None:
                num_ignored += 1
                continue
            _, offset, length, name = image
            label = label_of(task.path, handle, group, task.label)
            key = group.stem if task.is_ours else key_of(group.stem)
            taken.add(handle, size=length, offset=offset, key=key, name=name, label=label)
    finally:
        os.close(handle)
    return _scanned(task, size, checksum, taken, dali_index=dali_index_of(groups), num_ignored=num_ignored)


def _scanned(
    task: ScanTask, size: int, checksum: str, taken: _Taken, *, dali_index: str | None = None, num_ignored: int = 0
) -> Scanned:
    return Scanned(
        path=task.path, bytes=size, xxh128=checksum, columns=taken.rows.columns(), labels=taken.labels, bad=taken.bad,
        dali_index=dali_index, num_ignored=num_ignored,
    )  # fmt: skip


def _scan_beton(task: ScanTask, size: int, checksum: str, count: Count) -> Scanned:
    beton = Beton(task.path)
    block = our_block(beton)
    if block is not None and not task.image and not task.label:
        return _scan_our_beton(task, size, checksum, count, block)
    images = beton.images(image_field(beton, task.image or None))
    found = read_labels(beton, label_field(beton, task.label or None))
    taken = _Taken(task, count)
    width = len(str(max(beton.num_samples - 1, 0)))
    handle = os.open(task.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for row in range(beton.num_samples):
            offset = int(images.offsets[row])
            problem = "raw pixels; `maestri shards convert` makes a JPEG of them" if images.is_raw[row] else ""
            label: Any = int(found.first[row])
            if found.ends is not None and found.values is not None:
                label = found.values[int(found.ends[row - 1]) if row else 0 : int(found.ends[row])].tolist()
            key = f"{task.path.stem}/{row:0{width}d}" if not task.is_ours else f"{row:0{width}d}"
            taken.add(
                handle, size=int(images.sizes[row]), offset=offset, key=key_of(key), name=f"[{row}]", label=label,
                problem=problem,
            )  # fmt: skip
    finally:
        os.close(handle)
    names = tuple(str(label) for label in range(found.num_classes))
    scanned = _scanned(task, size, checksum, taken)
    return Scanned(**{name: getattr(scanned, name) for name in scanned.__slots__} | {"class_names": names})


def _scan_our_beton(task: ScanTask, size: int, checksum: str, count: Count, block: beton_block.Block) -> Scanned:
    """Takes the rows from the block of keys and checksums, and looks whether the images fit them."""
    columns, keys = block.columns, list(block.keys)
    ends = np.cumsum(columns["num_labels"]).tolist() if block.num_classes else []
    taken = _Taken(task, count)
    good = []
    handle = os.open(task.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for row, key in enumerate(keys):
            offset = int(columns["offset"][row])
            label: Any = int(columns["label"][row])
            if block.num_classes:
                label = columns["label_values"][ends[row - 1] if row else 0 : ends[row]].tolist()
            before = len(taken.labels)
            taken.add(
                handle, size=int(columns["bytes"][row]), offset=offset, key=key, name=f"[{row}]", label=label,
                checksum=int(columns["crc32"][row]),
            )  # fmt: skip
            good += [row] * (len(taken.labels) - before)
    finally:
        os.close(handle)
    found = taken.rows.columns()
    for name in ("orientation", "stored", "width", "height"):
        found[name] = columns[name][good]
    return Scanned(
        path=task.path, bytes=size, xxh128=checksum, columns=found, labels=taken.labels, bad=taken.bad,
        dali_index=None, class_names=block.class_names,
    )  # fmt: skip
