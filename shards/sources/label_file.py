"""Labels that lie in a file of their own: a table of file names, Kaggle's, or ImageNet's ground truth."""

import csv
import io
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from maestri.shards.errors import ShardError
from maestri.shards.sources.imagenet_devkit import devkit_table, ground_truth_table, is_devkit, is_wnid
from maestri.shards.sources.labels import LabelColumns, Labels

FILE_HEADINGS = frozenset(
    ("file", "files", "filename", "file_name", "filepath", "file_path", "image", "images", "image_id", "imageid")
    + ("image_name", "image_path", "img", "path", "name", "id", "key")
)
LABEL_HEADINGS = frozenset(
    ("label", "labels", "class", "classes", "class_name", "class_id", "cls", "target", "targets", "category")
    + ("categories", "wnid", "synset", "tags")
)
_KAGGLE = ["imageid", "predictionstring"]
_KAGGLE_CLASSES = "LOC_synset_mapping.txt"

_logger = logging.getLogger(__name__)

Table = dict[str, tuple[str, ...]]
"""Labels by file name, as they are written."""


def label_columns(path: Path, files: Sequence[str], *, class_names: Sequence[str] = ()) -> LabelColumns:
    """Returns the labels of files, −1 for those that the label file doesn't name.

    A file is found by its path, or by its name alone where no other file has it, with or without its extension.

    Args:
        path: one of
            - a table with a line per file, separated by commas, tabs or blanks: name, then one or more labels, or
              labels separated by ``;``; a first line with headings is recognised (``file,label``);
            - Kaggle's ``LOC_val_solution.csv`` or ``LOC_train_solution.csv``;
            - ``ILSVRC2012_devkit_t12.tar.gz``, or its ``ILSVRC2012_validation_ground_truth.txt`` with ``meta.mat``
              beside it.
        files: relative paths in the source.
        class_names: of all classes, where they are known; otherwise those in the table make them.

    Raises:
        ShardError: the label file is none of these, contradicts itself, or names none of the files.
    """
    try:
        table, names, are_numbers = _read(path)
    except OSError as error:
        raise ShardError(f"cannot read the labels: {error.strerror}: {path}") from None
    found = Labels(class_names or names)
    lookup = _Lookup(files)
    used: dict[str, str] = {}
    missing: list[str] = []
    is_multi = any(len(labels) > 1 for labels in table.values())
    for file in files:
        entry = lookup.entry_of(file, table)
        if entry is None:
            missing.append(file)
        elif used.setdefault(entry, file) != file:
            raise ShardError(f"{path}: '{entry}' is two files, {used[entry]} and {file}; write their folders too")
        labels = table.get(entry, ()) if entry is not None else ()
        values: list[object] = [int(label) for label in labels] if are_numbers else list(labels)
        found.add(values if is_multi else next(iter(values), None), f"{path}, {file}")
    if not used:
        some = next(iter(table), "")
        raise ShardError(f"{path} names none of the images: it says '{some}', and the first image is '{files[0]}'")
    if missing:
        _logger.warning("%d images are not in %s and get no label, such as %s", len(missing), path, missing[0])
    if len(table) > len(used):
        unused = next(name for name in table if name not in used)
        _logger.warning("%d lines of %s are about other files, such as %s", len(table) - len(used), path, unused)
    columns = found.columns()
    count = len(columns.class_names)
    if count and count != 1000 and not class_names and all(is_wnid(name) for name in columns.class_names):
        _logger.warning("%s names %d of ImageNet's classes: numbers differ from those of a whole set", path, count)
    return columns


class _Lookup:
    """Finds the line of the table that is about a file."""

    def __init__(self, files: Sequence[str]) -> None:
        self._times = Counter(name for file in files for name in {PurePosixPath(file).name, PurePosixPath(file).stem})

    def entry_of(self, file: str, table: Table) -> str | None:
        path = PurePosixPath(file)
        short = [name for name in (path.name, path.stem) if self._times[name] == 1 or "/" not in file]
        candidates = (file, str(path.with_suffix("")), *short)
        return next((name for name in candidates if name in table), None)


def _read(path: Path) -> tuple[Table, Sequence[str], bool]:
    """Returns the table, the names of all classes if they are known, and whether labels are numbers."""
    if is_devkit(path):
        return *devkit_table(path), False
    data = path.read_bytes()
    if b"\0" in data:
        raise ShardError(f"{path} is no text: labels are a table of file names and labels, or ImageNet's devkit")
    text = data.decode("utf-8-sig", "surrogateescape")
    first = text.split("\n", 1)[0].strip()
    if first.isascii() and first.isdigit():
        return *ground_truth_table(path, text), False
    rows = list(_rows(path, text))
    if rows and [cell.lower() for cell in rows[0][1]] == _KAGGLE:
        table = _table(path, ((line, name, _kaggle_labels(path, line, rest)) for line, (name, *rest) in rows[1:]))
        mapping = path.with_name(_KAGGLE_CLASSES)
        lines = mapping.read_text("utf-8", "surrogateescape").splitlines() if mapping.is_file() else ()
        return table, sorted(line.split()[0] for line in lines if line.strip()), False
    table = _table(path, _plain_entries(path, rows))
    labels = [label for entry in table.values() for label in entry]
    if not labels:
        raise ShardError(f"{path} holds no labels")
    are_numbers = all(label.removeprefix("-").isdigit() and label.isascii() and len(label) < 20 for label in labels)
    return table, (), are_numbers


def _table(path: Path, entries: Iterator[tuple[int, str, tuple[str, ...]]]) -> Table:
    table: Table = {}
    for line, name, labels in entries:
        name = name.removeprefix("./")
        if table.setdefault(name, labels) != labels:
            raise ShardError(f"{path}, line {line}: '{name}' had other labels above")
    if not table:
        raise ShardError(f"{path} is empty")
    return table


def _plain_entries(path: Path, rows: list[tuple[int, list[str]]]) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    name_at, labels_at = 0, slice(1, None)
    if rows and rows[0][1][0].lower() in FILE_HEADINGS:
        headings = [cell.lower() for cell in rows.pop(0)[1]]
        chosen = [at for at, heading in enumerate(headings) if heading in LABEL_HEADINGS]
        if len(chosen) != 1 and len(headings) != 2:
            known = ", ".join(sorted(LABEL_HEADINGS))
            raise ShardError(f"{path}: of columns {', '.join(headings)}, one should be called one of {known}")
        labels_at = slice(chosen[0], chosen[0] + 1) if chosen else slice(1, 2)
    for line, cells in rows:
        if len(cells) <= labels_at.start:
            raise ShardError(f"{path}, line {line}: no label; expected a file name and a label, got '{cells[0][:80]}'")
        labels = tuple(label.strip() for cell in cells[labels_at] for label in cell.split(";") if label.strip())
        yield line, cells[name_at], labels


def _kaggle_labels(path: Path, line: int, rest: list[str]) -> tuple[str, ...]:
    words = rest[0].split() if rest else []
    if not words or len(words) % 5 or not is_wnid(words[0]):
        raise ShardError(
            f"{path}, line {line}: expected class and box (n01751748 1 2 3 4), got '{' '.join(words)[:80]}'"
        )
    return tuple(dict.fromkeys(words[::5]))


def _rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yields line numbers and cells, without empty lines and comments."""
    sample = next((line for line in text.splitlines() if line.strip() and not line.startswith("#")), "")
    separator = "\t" if "\t" in sample else "," if "," in sample else ""
    if not separator:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip() and not line.startswith("#"):
                yield number, line.strip().rsplit(None, 1)  # a file's name may have blanks, a label has none
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells) and not cells[0].startswith("#"):
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise ShardError(f"{path}, line {reader.line_num}: {error}") from None
