"""Hugging Face's parquet files of images as a source.

A row cannot be read by itself: it lies in a compressed page.  So ``stage`` copies the images once into a spool file per
parquet file, with a table of where each one lies; workers read from there.
"""

import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestri.shards.errors import ShardError
from maestri.shards.files import sync, write_atomically
from maestri.shards.handles import Handles
from maestri.shards.images import BadImage, require_size
from maestri.shards.keys import escaped
from maestri.shards.listing import Listing, Strings
from maestri.shards.sources.file_patterns import files_at, short_names
from maestri.shards.sources.labels import Labels
from maestri.shards.sources.parquet_columns import ImageColumns, find_columns

BATCH_ROWS = 16
"""Rows in memory at a time."""
NO_IMAGE = -1
"""Size, in a spool's table, of an image that the row does not hold."""
_PAGE_BUFFER = 1 << 20
_MAGIC = b"maestri spool 1\n"

_logger = logging.getLogger(__name__)


class ParquetSource:
    """Parquet files with a column of images, and of labels or not; ``stage`` comes before ``listing``."""

    kind = "parquet"

    def __init__(
        self,
        path: Path,
        *,
        split: str = "",
        image_column: str = "",
        label_column: str = "",
        class_names: Sequence[str] = (),
    ) -> None:
        """Finds the files.

        Args:
            path: a parquet file, a folder with such files at any depth, a glob or a brace notation.
            split: which of a folder's files, by a word in their paths, such as ``train``.
            image_column: binary, or a struct with ``bytes``; found by its type where it is not said.
            label_column: integers, strings or lists of them; found by Hugging Face's metadata or its name.
            class_names: of all classes, where they are known and the files don't tell them.

        Raises:
            ShardError: there are no such files, or pyarrow is not installed.
            OSError: a folder cannot be read.
        """
        _pyarrow()
        self.path = path
        self.files = files_at(path, ".parquet", split=split)
        self._image_column = image_column
        self._label_column = label_column
        self._class_names = tuple(class_names)
        self._spools: tuple[Path, ...] = ()
        self._handles: Handles | None = None

    def __getstate__(self) -> dict[str, object]:
        """Leaves open files out: a worker process opens its own."""
        return {**self.__dict__, "_handles": None}

    def stage(self, folder: Path) -> None:
        """Copies the images out of the parquet files; files that were copied before and have not changed stay.

        Args:
            folder: for the copies, which together are as large as all images; made if it is not there.

        Raises:
            ShardError: a file is damaged or lacks a column.
            OSError: a file cannot be read, or the copy not written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._spools = tuple(folder / f"{number:05d}.images" for number in range(len(self.files)))
        for file, spool in zip(self.files, self._spools, strict=True):
            with _Parquet(file, self._image_column, self._label_column) as parquet:
                _stage(parquet, spool)

    def bytes_to_stage(self, folder: Path) -> int:
        """Returns about how many bytes ``stage`` will write into a folder: images hardly get smaller in parquet."""
        spools = (folder / f"{number:05d}.images" for number in range(len(self.files)))
        return sum(
            file.stat().st_size
            for file, spool in zip(self.files, spools, strict=True)
            if not _places_of(spool).exists()
        )

    def class_names(self) -> tuple[str, ...]:
        """Returns the listing's class names; for them, images need not be staged.

        Raises:
            ShardError: a file is damaged, or labels are none.
        """
        labels: Labels | None = None
        for file, shown in zip(self.files, short_names(self.files), strict=True):
            with _Parquet(file, self._image_column, self._label_column) as parquet:
                if labels is None:
                    labels = Labels(parquet.columns.class_names or self._class_names)
                    if parquet.columns.class_names:
                        break
                parquet.add_labels(labels, shown, parquet.num_rows)
        assert labels is not None
        return labels.columns().class_names

    def listing(self) -> Listing:
        """Returns the listing: rows in the files' order; labels are read from the parquet files.

        Raises:
            ShardError: a file is damaged or differs in its columns, there are no rows, or labels are none.
        """
        assert len(self._spools) == len(self.files), "stage() comes first"
        shown = short_names(self.files)
        keys: list[str] = []
        names: list[str] = []
        tables: list[NDArray[np.int64]] = []
        labels: Labels | None = None
        first: ImageColumns | None = None
        for number, (file, spool) in enumerate(zip(self.files, self._spools, strict=True)):
            with _Parquet(file, self._image_column, self._label_column) as parquet:
                columns = parquet.columns
                if first is None:
                    first, labels = columns, Labels(columns.class_names or self._class_names)
                elif columns != first:
                    raise ShardError(f"{file} has other columns or classes than {self.files[0]}")
                assert labels is not None
                table = _read_places(parquet, spool)
                if table is None:
                    raise ShardError(f"{spool} does not fit {file}; remove it and start again")
                parquet.add_labels(labels, shown[number], len(table))
            width = len(str(max(len(table) - 1, 0)))
            stem = escaped(shown[number].removesuffix(".parquet"))
            keys.extend(f"{stem}/{row:0{width}d}" for row in range(len(table)))
            names.extend(f"{shown[number]}[{row}]" for row in range(len(table)))
            tables.append(np.column_stack((np.full(len(table), number), table)))
        if not keys or first is None or labels is None:
            raise ShardError(f"{self.path} holds no rows")
        if not first.label:
            _logger.warning("%s has no column of labels; name one by --label if it has", self.path)
        places = np.concatenate(tables)
        found = labels.columns()
        return Listing(
            keys=Strings.of(keys),
            names=Strings.of(names),
            places=places,
            sizes=np.maximum(places[:, 2], 0),
            labels=found.labels,
            label_ends=found.label_ends,
            label_values=found.label_values,
            class_names=found.class_names,
        )

    def load(self, name: str, place: NDArray[np.int64]) -> bytes:
        """Returns the row's image file.

        Raises:
            BadImage: the row has no image, or only the path of one.
            OSError: the copy cannot be read, or is shorter than it was; the error names it.
        """
        number, offset, size = place.tolist()
        if size == NO_IMAGE:
            raise BadImage("the row holds no image bytes; it may name a file that is not in the data set")
        require_size(size)
        if self._handles is None:
            self._handles = Handles(self._spools)
        path = str(self._spools[number])
        try:
            data = self._handles.pread(number, size, offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None  # a failed read names no file
        if len(data) != size:
            raise OSError(errno.EIO, "shorter than when it was written", path)
        return data

    def close(self) -> None:
        """Closes open files; the next ``load`` opens them again."""
        if self._handles is not None:
            self._handles.close()
            self._handles = None


class _Parquet:
    """One open file; what pyarrow finds wrong with it is a ShardError.

    A page is decompressed as a whole, so one of them is what memory must hold: 1,024 rows as pyarrow writes by itself.
    """

    def __init__(self, path: Path, image_column: str, label_column: str) -> None:
        self.path = path
        parquet = _pyarrow()
        with path.open("rb"):  # so that what the system refuses is no damage
            pass
        with _DamageNamed(path, "its end"):
            self._file: Any = parquet.ParquetFile(path, buffer_size=_PAGE_BUFFER, pre_buffer=False)
        try:
            self.columns = find_columns(self._file.schema_arrow, path, image_column, label_column)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "_Parquet":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def num_rows(self) -> int:
        return int(self._file.metadata.num_rows)

    def identity(self) -> dict[str, object]:
        """Returns what tells this file, and what was asked of it, from others."""
        status = self.path.stat()
        with self.path.open("rb") as file:
            file.seek(max(status.st_size - (1 << 16), 0))
            end = hashlib.sha256(file.read()).hexdigest()
        return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "end": end, "image": self.columns.image}

    def images(self) -> Iterator[Any]:
        """Yields a buffer for each row, None where there is none."""
        columns = self.columns
        for batch in self._batches(columns.image_leaf, BATCH_ROWS):
            column = batch.column(0)
            if columns.is_struct:
                position = column.type.get_field_index("bytes")
                column = column.flatten()[position]  # takes the struct's own nulls into account
            for value in column:
                yield value.as_buffer() if value.is_valid else None

    def add_labels(self, labels: Labels, shown: str, count: int) -> None:
        """Adds each row's labels, none without a column of them.

        Args:
            labels: to which they are added.
            shown: what the file is called in errors.
            count: how many rows there should be.
        """
        for row, value in enumerate(self._labels(count)):
            labels.add(value, f"{shown}[{row}]")

    def _labels(self, count: int) -> Iterator[object]:
        """Yields a label for each row as it is written, None without labels."""
        if not self.columns.label:
            yield from (None for _ in range(count))
            return
        found = 0
        for batch in self._batches(self.columns.label, 4096):
            values = batch.column(0).to_pylist()
            found += len(values)
            yield from values
        if found != count:
            raise ShardError(f"{self.path}: {found} labels for {count} images")

    def _batches(self, column: str, rows: int) -> Iterator[Any]:
        done = 0
        with _DamageNamed(self.path, f"column {column}"):
            batches = iter(self._file.iter_batches(batch_size=rows, columns=[column], use_threads=False))
        while True:
            with _DamageNamed(self.path, f"column {column}, row {done} or after"):
                batch = next(batches, None)
                if batch is not None:
                    batch.validate(full=True)
            if batch is None:
                return
            if batch.num_columns != 1:
                raise ShardError(f"{self.path}: {batch.num_columns} columns are called {column}")
            done += batch.num_rows
            yield batch


class _DamageNamed:
    """Turns pyarrow's errors into a ShardError that names the file."""

    def __init__(self, path: Path, part: str) -> None:
        self._path = path
        self._part = part

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        # pyarrow's own errors are OSError for a damaged page, ValueError, NotImplementedError and so on.
        if isinstance(error, Exception) and not isinstance(error, ShardError):
            reason = " ".join(str(error).split())[:200]
            raise ShardError(f"{self._path} cannot be read as parquet, {self._part}: {reason}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class _SpoolHead:
    """What a spool's table says of itself."""

    source: dict[str, object]
    rows: int
    spool_bytes: int
    sha256: str
    """Of the table."""


def _stage(parquet: _Parquet, spool: Path) -> None:
    """Writes a spool file and its table, unless they are there."""
    if _read_places(parquet, spool) is not None:
        return
    _places_of(spool).unlink(missing_ok=True)
    draft = spool.with_name(f".{spool.name}.tmp")
    sizes = []
    try:
        with draft.open("wb") as file:
            for image in parquet.images():
                sizes.append(NO_IMAGE if image is None else image.size)
                if image is not None:
                    file.write(image)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(spool)
    finally:
        draft.unlink(missing_ok=True)
    sync(spool.parent)
    table = np.empty((len(sizes), 2), "<i8")
    table[:, 1] = sizes
    stored = np.maximum(table[:, 1], 0)
    table[:, 0] = np.cumsum(stored) - stored
    head = _SpoolHead(
        source=parquet.identity(),
        rows=len(sizes),
        spool_bytes=int(stored.sum()),
        sha256=hashlib.sha256(table.tobytes()).hexdigest(),
    )
    write_atomically(_places_of(spool), _MAGIC + json.dumps(asdict(head)).encode() + b"\n" + table.tobytes())


def _read_places(parquet: _Parquet, spool: Path) -> NDArray[np.int64] | None:
    """Returns offset and size of each row's image, None if the spool is not there, damaged or of another file."""
    try:
        data = _places_of(spool).read_bytes()
        spool_bytes = spool.stat().st_size
    except FileNotFoundError:
        return None
    head_bytes, _, body = data.removeprefix(_MAGIC).partition(b"\n")
    try:
        head = _SpoolHead(**json.loads(head_bytes))
    except (ValueError, TypeError):
        return None
    is_whole = head.sha256 == hashlib.sha256(body).hexdigest() and head.rows * 16 == len(body)
    if not data.startswith(_MAGIC) or not is_whole or head.spool_bytes != spool_bytes:
        return None
    if head.source != parquet.identity() or head.rows != parquet.num_rows:
        return None
    return np.frombuffer(body, "<i8").reshape(-1, 2).astype(np.int64)


def _places_of(spool: Path) -> Path:
    return spool.with_suffix(".places")


def _pyarrow() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ShardError("parquet needs pyarrow: pip install 'maestri[parquet]'") from None
    module: ModuleType = pyarrow.parquet
    return module
