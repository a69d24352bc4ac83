"""What is wrong with one shard, by sample, or by what lies between samples."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from maestri.shards import beton_rows
from maestri.shards.errors import ShardError
from maestri.shards.manifest import ShardInfo
from maestri.shards.parallel import Count
from maestri.shards.scan import ScanTask, scan
from maestri.shards.tar_layout import Row, pieces_of
from maestri.shards.tar_samples import dali_index_of, groups_of

_CHUNK = 1 << 22
_PNG = b"\x89PNG"


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """One thing that is wrong."""

    file: str
    """Path of the file."""
    problem: str
    """What it is."""
    byte: int | None = None
    """Where in the file, if that is known."""
    row: int | None = None
    """Which row of the index, if it concerns one."""
    key: str | None = None
    """Of that row."""

    def __str__(self) -> str:
        at = "" if self.byte is None else f", byte {self.byte}"
        who = "" if self.key is None else f"row {self.row} ({self.key}): "
        return f"{self.file}{at}: {who}{self.problem}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A shard to read."""

    path: Path
    """Of the shard."""
    idx: Path | None
    """Of DALI's index, where there should be one."""
    info: ShardInfo
    """What the manifest says."""
    is_ours: bool
    """Made by ``convert``, so that every byte follows from the rows."""
    first_row: int
    """Of the shard."""
    rows: dict[str, NDArray[Any]] | None
    """Its rows of the index; None where that cannot be opened."""
    keys: tuple[str, ...]
    """Of its rows."""
    are_rows_whole: bool
    """Whether the index is what the manifest says."""
    index: Path
    """Of the index."""
    image: str = ""
    """Which member or field holds the image, in shards of others."""
    label: str = ""
    """Which one holds the label."""


def look(task: Task, count: Count) -> list[Damage]:
    """Returns what is wrong with a shard; reads all of it.

    Raises:
        OSError: it cannot be read.
    """
    state, size = xxhash.xxh3_128(), 0
    with task.path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
            size += len(chunk)
            count(0, len(chunk), 0)
    found = []
    if size != task.info.bytes:
        found.append(_at(task, f"it has {size} bytes; the manifest says {task.info.bytes}", min(size, task.info.bytes)))
    is_whole = state.hexdigest() == task.info.xxh128
    if not is_whole:
        inside = list(_inside(task))
        found += inside
        if not inside and not found:
            found.append(_at(task, "its checksum is not the manifest's, but its images are whole"))
    elif not task.are_rows_whole:
        found += _wrong_rows(task, count)
    found += _damaged_dali_index(task)
    count(task.info.num_samples, 0, len(found))
    return found


def _inside(task: Task) -> Iterator[Damage]:
    """Yields which samples are damaged, or what between them."""
    if task.path.suffix == ".beton":
        yield from (
            Damage(file=str(task.path), problem=line.removeprefix(str(task.path)).lstrip(":, "))
            for line in beton_rows.damage(task.path)
            if task.is_ours or "has no block of keys" not in line
        )
        if task.is_ours:
            return
    if task.rows is None:
        yield _at(task, "its checksum is not the manifest's, and without the index its images cannot be told apart")
        return
    yield from _damaged_images(task)
    if task.is_ours:
        yield from _damaged_between(task)
    elif task.path.suffix == ".tar":
        yield from _wrong_rows(task, lambda *_: None)


def _damaged_images(task: Task) -> Iterator[Damage]:
    rows = task.rows
    assert rows is not None
    handle = os.open(task.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        numbers = zip(rows["offset"].tolist(), rows["bytes"].tolist(), rows["crc32"].tolist(), strict=True)
        for at, (offset, size, checksum) in enumerate(numbers):
            if offset + size > task.info.bytes or crc32(os.pread(handle, size, offset)) != checksum:
                yield _of_row(task, at, "the image's CRC-32 is wrong", byte=offset)
    finally:
        os.close(handle)


def _damaged_between(task: Task) -> Iterator[Damage]:
    """Compares all bytes of a tar of ours but the images with what convert wrote."""
    handle = os.open(task.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for piece in pieces_of(list(_layout_rows(task, handle))):
            if piece.content is None:
                assert task.rows is not None
                if piece.offset != task.rows["offset"][piece.row]:
                    yield _of_row(
                        task, piece.row, f"the index says that it is at byte {task.rows['offset'][piece.row]}"
                    )
                    return
                continue
            found = os.pread(handle, piece.size, piece.offset)
            if found != piece.content:
                differ = (i for i, (a, b) in enumerate(itertools.zip_longest(found, piece.content)) if a != b)
                byte, text = piece.offset + next(differ), f"damaged: {piece.what}"
                yield _of_row(task, piece.row, text, byte=byte) if piece.row < len(task.keys) else _at(task, text, byte)
    finally:
        os.close(handle)


def _layout_rows(task: Task, handle: int) -> Iterator[Row]:
    rows = task.rows
    assert rows is not None
    ends = rows["label_end"].tolist() if "label_end" in rows else None
    for at, key in enumerate(task.keys):
        labels = None
        if ends is not None:
            labels = tuple(rows["label_values"][ends[at - 1] if at else 0 : ends[at]].tolist())
        is_png = os.pread(handle, len(_PNG), int(rows["offset"][at])) == _PNG
        yield Row(
            key=key, label=int(rows["label"][at]), labels=labels, extension="png" if is_png else "jpg",
            bytes=int(rows["bytes"][at]),
        )  # fmt: skip


def _wrong_rows(task: Task, count: Count) -> Iterator[Damage]:
    """Compares the rows of the index with what is in the shard itself."""
    if task.rows is None:
        return
    try:
        found = scan(
            ScanTask(path=task.path, check="header", is_ours=task.is_ours, image=task.image, label=task.label), count
        )
    except ShardError as error:
        yield _at(task, str(error).removeprefix(str(task.path)).lstrip(":, "))
        return
    by_offset = {offset: at for at, offset in enumerate(found.columns["offset"].tolist())}
    names = ["bytes", "width", "height", "crc32"]
    names += ["orientation", "stored"] if task.path.suffix == ".beton" and task.is_ours else []
    for at, key in enumerate(task.keys):
        row = by_offset.get(int(task.rows["offset"][at]))
        if row is None:
            yield _row_of_index(task, at, f"'offset' is {task.rows['offset'][at]}, where no image starts")
            continue
        for name in names:
            if task.rows[name][at] != found.columns[name][row]:
                values = f"{task.rows[name][at]}; the shard has {found.columns[name][row]}"
                yield _row_of_index(task, at, f"'{name}' is {values}")
        if key != found.keys[row]:
            yield _row_of_index(task, at, f"the key is not the shard's, {found.keys[row]}")
        yield from _wrong_label(task, at, found.labels[row])


def _wrong_label(task: Task, at: int, label: Any) -> Iterator[Damage]:
    assert task.rows is not None
    if isinstance(label, int) and label != task.rows["label"][at]:
        yield _row_of_index(task, at, f"'label' is {task.rows['label'][at]}; the shard has {label}")


def _row_of_index(task: Task, at: int, problem: str) -> Damage:
    return Damage(file=str(task.index), problem=problem, row=task.first_row + at, key=task.keys[at])


def _damaged_dali_index(task: Task) -> Iterator[Damage]:
    if task.idx is None:
        return
    try:
        expected = dali_index_of(groups_of(task.path))
        if expected is not None and task.idx.read_bytes() != expected.encode():
            yield Damage(file=str(task.idx), problem=f"not the index of {task.path.name} (--repair makes it anew)")
    except FileNotFoundError:
        yield Damage(file=str(task.idx), problem="it is missing (--repair makes it anew)")
    except (ShardError, OSError) as error:
        yield Damage(file=str(task.idx), problem=f"cannot be compared with {task.path.name}: {error}")


def _at(task: Task, problem: str, byte: int | None = None) -> Damage:
    return Damage(file=str(task.path), problem=problem, byte=byte)


def _of_row(task: Task, at: int, problem: str, byte: int | None = None) -> Damage:
    return Damage(file=str(task.path), problem=problem, byte=byte, row=task.first_row + at, key=task.keys[at])
