"""What a conversion leaves behind so that the same command can finish it."""

import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maestri.shards.errors import ShardError
from maestri.shards.files import write_atomically
from maestri.shards.manifest import FILE_NAME, Manifest
from maestri.shards.worker import JOURNAL, QUARANTINE


class Journal:
    """The folder of an unfinished conversion, for one process at a time."""

    def __init__(self, out: Path, recipe: str) -> None:
        """Names the set's folder and the recipe of the conversion; nothing is touched yet."""
        self.out = out
        self.recipe = recipe
        self.is_complete = False
        """Whether the folder holds the whole set already."""
        self._folder = out / JOURNAL
        self._lock = -1

    def __enter__(self) -> "Journal":
        """Makes the folder, or takes up what is there.

        Raises:
            ShardError: it holds another set or something else, or a process is writing it.
            OSError: the disk failed.
        """
        if self._is_finished():
            return self
        recipe = self._folder / "recipe"
        if recipe.exists():
            if recipe.read_text(encoding="utf-8") != self.recipe:
                raise ShardError(
                    f"{self.out} holds an unfinished conversion of another source or with other settings; finish that, "
                    "or delete the folder"
                )
        elif self.out.exists() and any(path.name != JOURNAL for path in self.out.iterdir()):
            raise ShardError(f"{self.out} is not empty and holds no set of shards; choose another folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise ShardError(f"another process is converting into {self.out}; wait for it, or stop it") from None
        if not recipe.exists():
            write_atomically(recipe, self.recipe.encode())
        for draft in self._folder.glob("*.tmp"):
            draft.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._unlock()

    def record(self, name: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Returns what a worker left about a finished shard, and its rows by column.

        Raises:
            ShardError: it cannot be read.
        """
        try:
            record = json.loads((self._folder / f"{name}.json").read_text(encoding="utf-8"))
            with np.load(self._folder / f"{name}.npz", allow_pickle=False) as stored:
                return record, {column: stored[column] for column in stored.files}
        except (OSError, ValueError) as error:
            path = self.out / f"{name}.tar"
            raise ShardError(f"{path} has lost its journal ({error}); delete it and run the same command") from None

    def remove(self) -> None:
        """Removes the journal: the set is whole."""
        shutil.rmtree(self._folder)

    def drop_shard(self, name: str) -> None:
        """Removes a shard and its ``.idx``."""
        for suffix in (".tar", ".idx"):
            (self.out / f"{name}{suffix}").unlink(missing_ok=True)

    def discard(self, names: Sequence[str]) -> None:
        """Removes everything that the conversion wrote, and the folder if nothing else is in it."""
        for name in names:
            self.drop_shard(name)
        for folder in (self.out / QUARANTINE, self._folder):
            shutil.rmtree(folder, ignore_errors=True)
        if not any(self.out.iterdir()):
            self.out.rmdir()

    def _is_finished(self) -> bool:
        """Looks for a manifest.

        Raises:
            ShardError: there is one, of another set.
        """
        if not (self.out / FILE_NAME).exists():
            return False
        if Manifest.read(self.out).recipe != self.recipe:
            raise ShardError(
                f"{self.out} holds a set made from another source or with other settings; choose another folder"
            )
        shutil.rmtree(self._folder, ignore_errors=True)
        self.is_complete = True
        return True

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
