"""Which rows of a data set are trained on: by class, share, number a class, or a list; no shard is rewritten."""

import difflib
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from maestri.shards.keys import escaped
from maestri.shards.plan import shuffled
from maestri.shards.shard_set import ShardSet

_CHUNK = 1 << 16
"""Rows whose keys are looked at together."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionConfig:
    """Which samples of a data set are used; settings are applied in the order of fields."""

    list_file: str = ""
    """Text file of samples, one a line: keys, or paths or file names of the source; empty: all."""
    classes: tuple[str, ...] = ()
    """Names of classes, or their numbers; where samples have several labels, any may be one of these; empty: all."""
    fraction: float = 1.0
    """Share of each class, by first label, rounded up to a whole sample; a larger one holds all of a smaller one."""
    per_class: int = 0
    """At most so many samples a class, by first label; 0: no limit."""
    seed: int = 0
    """Which samples ``fraction`` and ``per_class`` take: the split's number, apart from the run's seed."""

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ValueError: a field is out of range.
        """
        if not 0 < self.fraction <= 1:
            raise ValueError(f"data.select.fraction is {self.fraction}; expected above 0 and at most 1")
        if self.per_class < 0:
            raise ValueError(f"data.select.per_class is {self.per_class}; expected at least 0")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"data.select.seed is {self.seed}; expected a whole number from 0 to 2**64 - 1")


def select_rows(shard_set: ShardSet, config: SelectionConfig, *, num_rows: int) -> NDArray[np.int64] | None:
    """Returns the selected ones of the rows [0, num_rows), ascending; None if those are all.

    Args:
        shard_set: the samples.
        config: which of them.
        num_rows: rows that may be selected; those behind are held out, and left out where they are listed.

    Raises:
        ValueError: a class or a listed sample is not there, a sample is listed twice, or nothing is selected.
    """
    assert 0 <= num_rows <= len(shard_set)
    chosen = np.ones(num_rows, np.bool_)
    if config.list_file:
        listed = _listed_rows(shard_set, Path(config.list_file))
        if (held_out := int((listed >= num_rows).sum())) > 0:
            _logger.warning("%d of %d samples in %s are held out and not used", held_out, len(listed), config.list_file)
        chosen[:] = False
        chosen[listed[listed < num_rows]] = True
    if config.classes:
        chosen &= _has_class(shard_set, config, chosen)
    if config.fraction < 1 or config.per_class:
        if config.per_class and shard_set.manifest.labels == "none":
            raise ValueError(f"data.select.per_class is {config.per_class}; expected 0: the samples have no labels")
        chosen = _thinned(shard_set.columns.label[:num_rows], config, chosen)
    if chosen.all():
        return None
    if not chosen.any():
        raise ValueError(f"data.select leaves none of {num_rows} samples: {config}")
    return np.flatnonzero(chosen).astype(np.int64, copy=False)


def identity(rows: NDArray[np.int64] | None) -> str:
    """Returns a checksum of selected rows, hexadecimal; empty where all are."""
    return "" if rows is None else xxhash.xxh3_64_hexdigest(np.ascontiguousarray(rows, "<i8").tobytes())


def shard_sizes(shard_set: ShardSet, rows: NDArray[np.int64] | None, num_rows: int) -> NDArray[np.int64]:
    """Returns how many of the rows that ``select_rows`` gave for [0, num_rows) lie in each shard, int64 ``shard``."""
    counts = np.array([shard.num_samples for shard in shard_set.manifest.shards], np.int64)
    bounds = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))
    ends = np.minimum(bounds, num_rows) if rows is None else np.searchsorted(rows, bounds)
    return np.diff(ends).astype(np.int64, copy=False)


def _thinned(labels: NDArray[np.int32], config: SelectionConfig, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Returns which rows are left of the chosen ones: of each class, and of none, the first in the seed's order."""
    rows = shuffled(len(labels), config.seed)
    rows = rows[chosen[rows]]
    rows = rows[np.argsort(labels[rows], kind="stable")]
    _, starts, counts = np.unique(labels[rows], return_index=True, return_counts=True)
    share = Fraction(str(float(config.fraction)))  # 0.07 of 100 are 7: the number that was written, not its float
    limits = [-(-count * share.numerator // share.denominator) for count in counts.tolist()]
    if config.per_class:
        limits = [min(limit, config.per_class) for limit in limits]
    places = np.arange(len(rows)) - np.repeat(starts, counts)
    left = np.zeros_like(chosen)
    left[rows[places < np.repeat(np.array(limits, np.int64), counts)]] = True
    return left


def _has_class(shard_set: ShardSet, config: SelectionConfig, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Returns which rows are of a wanted class, after a look whether each class has a chosen one."""
    columns, num_rows = shard_set.columns, len(chosen)
    wanted = _labels_of(config.classes, shard_set)
    if columns.label_end is None or columns.label_values is None:
        values, is_chosen = columns.label[:num_rows], chosen
        found = hits = np.isin(values, wanted)
    else:
        ends = columns.label_end[:num_rows].astype(np.int64)
        owners = np.repeat(np.arange(num_rows), ends - np.concatenate((ends[:1] * 0, ends[:-1])))
        values, is_chosen = columns.label_values[: len(owners)], chosen[owners]
        hits = np.isin(values, wanted)
        found = np.zeros(num_rows, np.bool_)
        found[owners[hits]] = True
    present = np.unique(values[hits & is_chosen])
    empty = [name for name, label in zip(config.classes, wanted, strict=True) if label not in present]
    if empty:
        among = f"samples in {config.list_file}" if config.list_file else f"first {num_rows} samples"
        others = f" and {len(empty) - 1} others" if len(empty) > 1 else ""
        raise ValueError(f"data.select.classes: none of the {among} is of class {empty[0]!r}{others}")
    return found


def _labels_of(classes: Sequence[str], shard_set: ShardSet) -> list[int]:
    """Returns the label of each class, given by name, or by number where no class is called so.

    Raises:
        ValueError: there is no such class.
    """
    if shard_set.manifest.labels == "none":
        raise ValueError(f"data.select.classes is {', '.join(classes)}; expected none: the samples have no labels")
    names = shard_set.manifest.class_names
    positions = {name: label for label, name in enumerate(names)}
    labels = []
    for text in classes:
        label = positions.get(text)
        if label is None and text.isascii() and text.isdigit() and (not names or int(text) < len(names)):
            label = int(text)
        if label is None:
            close = difflib.get_close_matches(text, names, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"data.select.classes holds {text!r}, which is none of {len(names)} classes{hint}")
        labels.append(label)
    return labels


def _listed_rows(shard_set: ShardSet, path: Path) -> NDArray[np.int64]:
    """Returns the row of each line of a file.

    Raises:
        ValueError: the file cannot be read or is empty, or a line is no sample, several, or that of another line.
    """
    try:
        content = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"data.select.list_file {path} cannot be read: {error.strerror}") from None
    lines = [(number, text) for number, line in enumerate(content.split("\n"), 1) if (text := line.strip())]
    if not lines:
        raise ValueError(f"data.select.list_file {path} lists no sample")
    candidates = [_keys_for(text) for _, text in lines]
    whole, inside = _find(shard_set, candidates)
    wrong: dict[str, list[str]] = defaultdict(list)
    line_of: dict[int, int] = {}
    for (number, text), keys in zip(lines, candidates, strict=True):
        rows = _first(whole, keys[:1]) or _first(inside, keys[:1]) or _first(whole, keys[1:])
        if not rows:
            wrong["no sample"].append(f"line {number}: {text!a}")
        elif len(rows) > 1:
            keys_of = " or ".join(shard_set.key(row) for row in rows[:2])
            wrong["more than one sample"].append(f"line {number}: {text!a} may be {keys_of}")
        elif rows[0] in line_of:
            wrong["there already"].append(f"line {number}: {text!a} is that of line {line_of[rows[0]]}")
        else:
            line_of[rows[0]] = number
    if wrong:
        what, found = next(iter(wrong.items()))
        raise ValueError(f"{len(found)} of {len(lines)} lines of {path} are {what}; the first: {found[0]}")
    return np.array(list(line_of), np.int64)


def _keys_for(text: str) -> list[list[bytes]]:
    """Returns the keys that a line may stand for, likelier ones first: for the whole path, then without its folders.

    A name may be a key, or a file's with its extension, which keys have only where files differ in nothing else.
    """
    parts = [part for part in text.split("/") if part not in ("", ".")]
    found = []
    for first in range(len(parts)):
        name = "/".join(parts[first:])
        stem = "/".join((*parts[first:-1], parts[-1].rpartition(".")[0] or parts[-1]))
        keys = dict.fromkeys((name, escaped(name), escaped(stem)))
        found.append([key.encode(errors="surrogateescape") for key in keys])
    return found


def _find(
    shard_set: ShardSet, candidates: Sequence[list[list[bytes]]]
) -> tuple[dict[bytes, list[int]], dict[bytes, list[int]]]:
    """Returns the rows of which a candidate is the key, and those of which the whole path is the end of the key."""
    wholes = {key for keys in candidates for likely in keys for key in likely}
    ends = {key for keys in candidates for likely in keys[:1] for key in likely}
    depths = sorted({key.count(b"/") + 1 for key in ends})
    whole: dict[bytes, list[int]] = defaultdict(list)
    inside: dict[bytes, list[int]] = defaultdict(list)
    for row, key in _keys_named(shard_set, {key.rpartition(b"/")[2] for key in wholes}):
        if key in wholes:
            whole[key].append(row)
        parts = key.split(b"/")
        for depth in depths:
            if depth < len(parts) and (end := b"/".join(parts[-depth:])) in ends:
                inside[end].append(row)
    return whole, inside


def _keys_named(shard_set: ShardSet, names: set[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yields row and key of the samples whose key, without folders, is one of the names."""
    columns = shard_set.columns
    for first in range(0, len(shard_set), _CHUNK):
        ends = columns.key_end[first : first + _CHUNK].astype(np.int64)
        base = int(columns.key_end[first - 1]) if first else 0
        content = columns.keys[base : int(ends[-1])]
        ends -= base
        starts = np.concatenate((np.zeros(1, np.int64), ends[:-1]))
        # Behind the last slash before the key's end, if that is not before its start.
        slashes = np.concatenate((np.full(1, -1), np.flatnonzero(content == ord("/"))))
        name_starts = np.maximum(starts, slashes[np.searchsorted(slashes, ends) - 1] + 1)
        text = content.tobytes()
        places = enumerate(zip(name_starts.tolist(), ends.tolist(), strict=True))
        for place in [place for place, (start, end) in places if text[start:end] in names]:
            yield first + place, text[starts[place] : ends[place]]


def _first(rows_of: dict[bytes, list[int]], keys: Iterable[list[bytes]]) -> list[int]:
    """Returns the rows of the first key that has any."""
    return next((rows_of[key] for likely in keys for key in likely if key in rows_of), [])
