"""What can be wrong with a data set on disk."""

from pathlib import Path


class ShardError(ValueError):
    """A data set that cannot be read or written; the text is one line for the user."""


class ShardCorrupt(ShardError):
    """Stored bytes that are not what the index says."""

    def __init__(self, path: str | Path, offset: int, reason: str) -> None:
        super().__init__(f"{path}, byte {offset}: {reason}")
        self.path = Path(path)
        self.offset = offset
        self.reason = reason

    def __reduce__(self) -> "tuple[type[ShardCorrupt], tuple[Path, int, str]]":
        return ShardCorrupt, (self.path, self.offset, self.reason)
