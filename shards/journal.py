"""What a conversion leaves behind so that the same command, or another part of it, can finish the job."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestri.shards.errors import ShardError
from maestri.shards.files import sync, write_atomically
from maestri.shards.manifest import FILE_NAME, Manifest

JOURNAL = ".convert"
"""Folder, in the set's, of what a conversion needs to go on after an interruption."""
QUARANTINE = "quarantine"
"""Folder, in the set's, of rejected images."""
HEAD = "conversion.json"
"""File, in the journal, of what the conversion is."""
_STAGED = "staged"
_RECORD = {"files", "images", "key_bytes", "labels", "bad"}


class Journal:
    """The folder of an unfinished conversion, for one process at a time, or one for each part."""

    def __init__(self, out: Path, formats: tuple[str, ...], *, part: str = "") -> None:
        """Names the folder of the conversion, the formats and, where there are several, the part; touches nothing."""
        self.out = out
        self.formats = formats
        self.head: dict[str, Any] = {}
        """Of the conversion: ``recipe``, ``num_shards``, ``encoders`` and what its manifest will say."""
        mine = f"-{part.replace('/', '-of-')}" if part else ""
        self.drafts = out / JOURNAL / f"drafts{mine}"
        """Folder for unfinished files, of this part alone."""
        self.staged = out / JOURNAL / f"{_STAGED}{mine}"
        """Folder for the images of sources that cannot be read at random, of this part alone."""
        self._part = part
        self._is_complete = False
        self._made_out = False
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
        self._made_out = not self.out.exists()
        try:
            self._lock(self._folder, shared=bool(self._part))
            self.drafts.mkdir(exist_ok=True)
            if self._part:
                self._lock(self.drafts, shared=False)
            for draft in self.drafts.iterdir():
                draft.unlink()
            if (self._folder / HEAD).exists():
                self.head = self._read_head()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def claim(self, head: Mapping[str, Any]) -> bool:
        """Makes the folder this conversion's; returns whether the set is whole already.

        Args:
            head: ``recipe`` and whatever else ``head`` is to hold.

        Raises:
            ShardError: it is another conversion's, or one in another number of parts, or by other encoders.
        """
        for folder in filter(_is_set, map(self.folder, self.formats)):
            if Manifest.read(folder).recipe != head["recipe"]:
                raise ShardError(
                    f"{folder} holds a set made from another source or with other settings; choose another folder"
                )
        if self.is_whole():
            self.head, self._is_complete = {}, True
            return True
        self.head = self._published(head)
        if self.head["recipe"] != head["recipe"]:
            raise ShardError(
                f"{self.out} holds an unfinished conversion of another source or with other settings; finish that, "
                "or delete the folder"
            )
        if head["part_count"] not in (1, self.head["part_count"]):  # a conversion in one go finishes any part's job
            how = "in one go" if self.head["part_count"] == 1 else f"in {self.head['part_count']} parts"
            raise ShardError(f"{self.out} is being converted {how}, not in {head['part_count']} parts")
        require_encoders(self.head, head, str(self.out))
        for form in self.formats:
            self.folder(form).mkdir(exist_ok=True)
        return False

    def is_whole(self) -> bool:
        """Returns whether there is a set in every format."""
        return all(_is_set(self.folder(form)) for form in self.formats)

    def paths_only(self) -> "Journal":
        """Returns a journal for worker processes, which knows where things lie and holds no lock."""
        return Journal(self.out.absolute(), self.formats, part=self._part)

    def folder(self, form: str) -> Path:
        """Returns the folder of the set in a format: one in itself, or one for each of several formats."""
        return self.out if len(self.formats) == 1 else self.out / form

    def shard(self, form: str, name: str) -> Path:
        """Returns the path of a shard."""
        return self.folder(form) / f"{name}.{form}"

    def checks(self, name: str) -> Path:
        """Returns the path of what other processes than a shard's writer find out about its images."""
        return self.drafts / f"{name}.checks"

    def finished(self) -> set[str]:
        """Returns the names of shards that are in place in every format, and of those without an image."""
        found = []
        for form in self.formats:
            suffix = f".{form}"
            with os.scandir(self.folder(form)) as entries:
                found.append({e.name.removesuffix(suffix) for e in entries if e.name.endswith(suffix)})
        names = set.intersection(*found)
        with os.scandir(self._folder) as entries:
            recorded = {e.name.removesuffix(".json") for e in entries if e.name.endswith(".json") and e.name != HEAD}
        return names | {name for name in recorded - names if self._is_empty(name)}

    def write_record(self, name: str, record: Mapping[str, Any], columns: Mapping[str, NDArray[Any]]) -> None:
        """Keeps what is to be known about a shard; comes before its files are put into place."""
        draft = self.drafts / f"{name}.npz.tmp"
        with draft.open("wb") as file:
            np.savez(file, **columns)  # type: ignore[arg-type]  # numpy's stub takes the columns for allow_pickle
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._folder / f"{name}.npz")
        write_atomically(self._folder / f"{name}.json", json.dumps(record).encode(), drafts=self.drafts)

    def record(self, name: str) -> dict[str, Any]:
        """Returns what a worker left about a finished shard.

        Raises:
            ShardError: it cannot be read.
        """
        try:
            found: dict[str, Any] = json.loads((self._folder / f"{name}.json").read_text(encoding="utf-8"))
            if not isinstance(found, dict) or not found.keys() >= _RECORD:
                raise ValueError("fields are missing")
        except (OSError, ValueError) as error:
            raise self._lost(name, error) from None
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

    def drop_staged(self) -> None:
        """Removes the staged images, which nothing needs any more."""
        shutil.rmtree(self.staged, ignore_errors=True)

    def _leave(self) -> None:
        """Leaves no trace of a set that is whole, nor of a conversion that never began; gives the locks back."""
        try:
            with suppress(OSError):  # an error on the way out would hide the one that is on its way
                if self._is_complete or (not self.head and not self._has_staged() and self._is_alone()):
                    shutil.rmtree(self._folder, ignore_errors=True)
                    if self._made_out and not any(self.out.iterdir()):
                        self.out.rmdir()
        finally:
            while self._locks:
                os.close(self._locks.pop())

    def _published(self, head: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the head that is there, after putting this one into place if there was none.

        Several parts may do so at once; the first one's counts.
        """
        path, draft = self._folder / HEAD, self.drafts / HEAD
        if not path.exists():
            try:
                draft.write_text(json.dumps(dict(head)), encoding="utf-8")
                sync(draft)
                try:
                    os.link(draft, path)  # unlike a rename, never replaces another's
                except FileExistsError:
                    pass
                except OSError:  # no links on this disk
                    if not path.exists():
                        draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
            sync(self._folder)
        return self._read_head()

    def _is_empty(self, name: str) -> bool:
        """Returns whether a shard is finished and has no image, so that its files may be gone."""
        try:
            return bool(self.record(name)["images"] == 0)
        except ShardError:
            return False

    def _has_staged(self) -> bool:
        """Returns whether this part, or another, left images that it would have to copy again."""
        return any(any(folder.iterdir()) for folder in self._folder.glob(f"{_STAGED}*") if folder.is_dir())

    def _is_alone(self) -> bool:
        """Returns whether no other part is at work."""
        try:
            fcntl.flock(self._locks[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, IndexError):
            return False
        return not (self._folder / HEAD).exists()

    def _is_ours(self) -> bool:
        return self._folder.is_dir() or any(_is_set(self.folder(form)) for form in self.formats)

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
        """Makes and locks a folder that another process may be about to remove."""
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(folder, os.O_RDONLY)
            except FileNotFoundError:
                continue
            self._locks.append(handle)
            try:
                fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._locks.pop())
                part = f"part {self._part} is being converted"
                what = part if folder == self.drafts else "another process is converting"
                raise ShardError(f"{what} into {self.out}; wait for it, or stop it") from None
            with suppress(FileNotFoundError):
                if folder.stat().st_ino == os.fstat(handle).st_ino:
                    return
            os.close(self._locks.pop())  # it was removed before it was locked


def _is_set(folder: Path) -> bool:
    return (folder / FILE_NAME).exists()


def require_encoders(one: Mapping[str, Any], other: Mapping[str, Any], where: str) -> None:
    """Raises ShardError where heads of one conversion name different versions of what encodes images."""
    first, second = one.get("encoders"), other.get("encoders")
    if first and second and first != second:
        names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
        differing = ", ".join(f"{name} {first.get(name, 'none')} and {second.get(name, 'none')}" for name in names)
        raise ShardError(
            f"{where} was begun with other libraries, which may encode images otherwise: {differing}; use the "
            "same everywhere, or begin anew in another folder"
        )
