"""What a conversion leaves behind so that the same command, or another part of it, can finish the job."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestri.shards.errors import ShardError
from maestri.shards.files import write_atomically
from maestri.shards.manifest import FILE_NAME, Manifest

JOURNAL = ".convert"
"""Folder, in the set's, of what a conversion needs to go on after an interruption."""
QUARANTINE = "quarantine"
"""Folder, in the set's, of rejected images."""
HEAD = "conversion.json"
"""File, in the journal, of what the conversion is."""


class Journal:
    """The folder of an unfinished conversion, for one process at a time, or one for each part."""

    def __init__(self, out: Path, formats: tuple[str, ...], *, part: str = "") -> None:
        """Names the folder of the conversion, the formats and, where there are several, the part; touches nothing."""
        self.out = out
        self.formats = formats
        self.head: dict[str, Any] = {}
        """Of the conversion: ``recipe``, ``num_shards`` and what its manifest will say."""
        self.drafts = out / JOURNAL / f"drafts{part and '-'}{part.replace('/', '-of-')}"
        """Folder for unfinished files."""
        self.staged = out / JOURNAL / "staged"
        """Folder for the images of sources that cannot be read at random."""
        self._part = part
        self._is_complete = False
        self._folder = out / JOURNAL
        self._locks: list[int] = []

    def __enter__(self) -> "Journal":
        """Takes the folder.

        Raises:
            ShardError: it holds something else, or another process is at work in it.
            OSError: the disk failed.
        """
        if self.out.exists() and not self._is_ours() and any(self.out.iterdir()):
            raise ShardError(f"{self.out} is not empty and holds no set of shards; choose another folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock(self._folder, shared=bool(self._part))
        self.drafts.mkdir(exist_ok=True)
        if self._part:
            self._lock(self.drafts, shared=False)
        for draft in self.drafts.iterdir():
            draft.unlink()
        if (self._folder / HEAD).exists():
            self.head = self._read_head()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_complete or (not self.head and not self._has_staged() and self._is_alone()):  # leave no trace
            shutil.rmtree(self._folder, ignore_errors=True)
            if not any(self.out.iterdir()):
                self.out.rmdir()
        while self._locks:
            os.close(self._locks.pop())

    def claim(self, head: Mapping[str, Any]) -> bool:
        """Makes the folder this conversion's; returns whether the set is whole already.

        Args:
            head: ``recipe`` and whatever else ``head`` is to hold.

        Raises:
            ShardError: it is another conversion's.
        """
        whole = [self.folder(form) for form in self.formats if (self.folder(form) / FILE_NAME).exists()]
        for folder in whole:
            if Manifest.read(folder).recipe != head["recipe"]:
                raise ShardError(
                    f"{folder} holds a set made from another source or with other settings; choose another folder"
                )
        if len(whole) == len(self.formats):
            self.head, self._is_complete = {}, True
            return True
        if self.head and self.head["recipe"] != head["recipe"]:
            raise ShardError(
                f"{self.out} holds an unfinished conversion of another source or with other settings; finish that, "
                "or delete the folder"
            )
        if not self.head:
            self.head = dict(head)
            write_atomically(self._folder / HEAD, json.dumps(self.head).encode(), drafts=self.drafts)
            for form in self.formats:
                self.folder(form).mkdir(exist_ok=True)
        return False

    def paths_only(self) -> "Journal":
        """Returns a journal for worker processes, which knows where things lie and holds no lock."""
        return Journal(self.out.absolute(), self.formats, part=self._part)

    def folder(self, form: str) -> Path:
        """Returns the folder of the set in a format: one in itself, or one for each of several formats."""
        return self.out if len(self.formats) == 1 else self.out / form

    def shard(self, form: str, name: str) -> Path:
        """Returns the path of a shard."""
        return self.folder(form) / f"{name}.{form}"

    def finished(self) -> set[str]:
        """Returns the names of shards that are in place in every format."""
        found = []
        for form in self.formats:
            suffix = f".{form}"
            with os.scandir(self.folder(form)) as entries:
                found.append({e.name.removesuffix(suffix) for e in entries if e.name.endswith(suffix)})
        return set.intersection(*found)

    def write_record(self, name: str, record: Mapping[str, Any], columns: Mapping[str, NDArray[Any]]) -> None:
        """Keeps what is to be known about a shard; comes before its files are put into place."""
        draft = self._folder / f"{name}.npz.tmp"
        with draft.open("wb") as file:
            np.savez(file, **columns)  # type: ignore[arg-type]  # numpy's stub takes the columns for allow_pickle
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._folder / f"{name}.npz")
        write_atomically(self._folder / f"{name}.json", json.dumps(record).encode())

    def record(self, name: str) -> dict[str, Any]:
        """Returns what a worker left about a finished shard.

        Raises:
            ShardError: it cannot be read.
        """
        try:
            found = json.loads((self._folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._lost(name, error) from None
        assert isinstance(found, dict)
        return found

    def columns(self, name: str) -> dict[str, NDArray[Any]]:
        """Returns the rows of a finished shard by column.

        Raises:
            ShardError: they cannot be read.
        """
        try:
            with np.load(self._folder / f"{name}.npz", allow_pickle=False) as stored:
                return {column: stored[column] for column in stored.files}
        except (OSError, ValueError) as error:
            raise self._lost(name, error) from None

    def files_of(self, name: str) -> Iterator[Path]:
        """Yields the paths of a shard's files below ``out``, those that make it finished last."""
        yield from (Path(JOURNAL) / f"{name}{suffix}" for suffix in (".npz", ".json"))
        for form in sorted(self.formats):  # beton, then tar
            path = self.shard(form, name).relative_to(self.out)
            yield from (path.with_suffix(".idx"), path) if form == "tar" else (path,)

    def remove(self) -> None:
        """Has the journal removed at the end: the set is whole."""
        self.head, self._is_complete = {}, True

    def discard(self, names: list[str]) -> None:
        """Removes everything that the conversion wrote, and the folder if nothing else is in it."""
        for name in names:
            self.drop_shard(name)
        for form in self.formats:
            shutil.rmtree(self.folder(form) / QUARANTINE, ignore_errors=True)
            if len(self.formats) > 1:
                self.folder(form).rmdir()
        self.remove()

    def drop_shard(self, name: str) -> None:
        """Removes a shard's files from the set."""
        for path in self.files_of(name):
            if path.parts[0] != JOURNAL:
                (self.out / path).unlink(missing_ok=True)

    def _has_staged(self) -> bool:
        return self.staged.is_dir() and any(self.staged.iterdir())

    def _is_alone(self) -> bool:
        """Returns whether no other part is at work."""
        try:
            fcntl.flock(self._locks[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, IndexError):
            return False
        return not (self._folder / HEAD).exists()

    def _is_ours(self) -> bool:
        return self._folder.is_dir() or any((self.folder(form) / FILE_NAME).exists() for form in self.formats)

    def _read_head(self) -> dict[str, Any]:
        try:
            head = json.loads((self._folder / HEAD).read_text(encoding="utf-8"))
            if not {"recipe", "formats", "num_shards", "part_count", "manifest"} <= head.keys():
                raise ValueError("fields are missing")
        except (OSError, ValueError, AttributeError) as error:
            raise ShardError(f"{self._folder / HEAD} cannot be read ({error}); delete {self.out}") from None
        assert isinstance(head, dict)
        return head

    def _lost(self, name: str, error: Exception) -> ShardError:
        path = self.shard(self.formats[0], name)
        return ShardError(f"{path} has lost its journal ({error}); delete it and run the same command")

    def _lock(self, folder: Path, *, shared: bool) -> None:
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            what = f"part {self._part} is being converted" if folder == self.drafts else "another process is converting"
            raise ShardError(f"{what} into {self.out}; wait for it, or stop it") from None
        self._locks.append(handle)
