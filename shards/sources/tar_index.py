"""Where the members of a tar lie: headers only, by seeking, with every number checked before it is used.

Python's ``tarfile`` takes many times as long, remembers every member, and ends quietly where it should complain.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from maestri.shards.errors import ShardCorrupt, ShardError

BLOCK = 512
"""Bytes; headers and contents are padded to a multiple of it."""
MAX_EXTENSION = 1 << 20
"""Bytes of a long name or of a pax header."""
MAX_OFFSET = 1 << 62
_PADDING_CHECKED = 1 << 20
"""Bytes behind the end marker that are looked at for a second archive."""
_EMPTY = bytes(BLOCK)
_USTAR, _GNU = b"ustar\0", b"ustar "
_REGULAR = b"\x0007"
"""Types of files: NUL in old archives, 0, and 7 for contiguous ones."""
_FOLDER = ord("5")
_KINDS = {
    "1": "hard links", "2": "symbolic links", "3": "character devices", "4": "block devices", "6": "pipes",
    "D": "lists of folders", "V": "volume labels",
}  # fmt: skip
_WITHOUT_CONTENT = frozenset("12346")
_COMPRESSIONS = (
    (b"\x1f\x8b", "gzip", "gunzip -k"), (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
    (b"\xfd7zXZ\0", "xz", "unxz -k"), (b"BZh", "bzip2", "bunzip2 -k"), (b"\x04\x22\x4d\x18", "lz4", "unlz4"),
)  # fmt: skip
_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")

Member = tuple[str, int, int]
"""Name as it is in the archive, where the content starts in the file, its size."""


def tar_members(
    path: Path,
    ignored: Counter[str] | None = None,
    *,
    folders: set[str] | None = None,
    start: int = 0,
    end: int | None = None,
) -> Iterator[Member]:
    """Yields the regular files of an uncompressed tar, in its order; never reads what is in them.

    Names are only text here: they may be absolute, climb by ``..``, or be no UTF-8 (surrogates stand for such bytes).

    Args:
        path: v7, ustar, GNU or pax.
        ignored: counts what is neither a regular file nor a folder, by kind.
        folders: takes the names of folders, without a final ``/``.
        start: where the archive starts in the file; another archive may be around it.
        end: where it ends at the latest.

    Raises:
        ShardError: the archive is compressed, damaged, cut off or of a kind that cannot be read by seeking.
        OSError: the file cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(handle).st_size
        stop = size if end is None else end
        assert 0 <= start <= stop
        if stop > size:
            raise ShardCorrupt(path, start, f"the archive should end at byte {stop}, the file ends at byte {size}")
        counts = Counter[str]() if ignored is None else ignored
        yield from _Scan(path, handle, start, stop, counts, set() if folders is None else folders).members()
    finally:
        os.close(handle)


def _compression_of(head: bytes) -> tuple[str, str] | None:
    """Returns the name and command of what a file was compressed with, None if it is none of the usual."""
    return next(((name, command) for magic, name, command in _COMPRESSIONS if head.startswith(magic)), None)


class _Scan:
    def __init__(
        self, path: Path, handle: int, start: int, stop: int, ignored: Counter[str], folders: set[str]
    ) -> None:
        self.path = path
        self.handle = handle
        self.start = start
        self.stop = stop
        self.ignored = ignored
        self.folders = folders
        self.name: str | None = None
        self.size: int | None = None

    def members(self) -> Iterator[Member]:
        at, stop, handle = self.start, self.stop, self.handle
        while True:
            block = os.pread(handle, BLOCK, at) if at + BLOCK <= stop else b""
            if len(block) < BLOCK or block == _EMPTY:
                self._check_end(at)
                return
            # What nearly everyone writes; _check_sum knows the other ways too, and says what is wrong.
            if block[148:154] != b"%06o" % (sum(block) - sum(block[148:156]) + 8 * ord(" ")):
                self._check_sum(block, at)
            kind = block[156]
            content = at + BLOCK
            size = self._number(block, at)
            is_file = kind in _REGULAR
            if kind in b"LKxXg":
                at = content + self._extend(chr(kind), content, size)
                continue
            if self.name is None and self.size is None:
                name = self._short_name(block)
            else:
                name = self._short_name(block) if self.name is None else self.name
                size = size if self.size is None else self.size
                self.name = self.size = None
            if kind == _FOLDER or (is_file and name.endswith("/")):  # the latter is how v7 has it
                self.folders.add(name.rstrip("/"))
                at = content
                continue
            if not is_file:
                size = self._size_of_other(chr(kind), at, size)
            after = content + (size + BLOCK - 1) // BLOCK * BLOCK
            if content + size > stop:
                raise self._broken(at, f"{name[:200]!a} has {size} bytes, {stop - content} are left: cut off")
            if is_file:
                yield name, content, size
            at = after

    def _size_of_other(self, kind: str, at: int, size: int) -> int:
        if kind == "S":
            raise self._broken(at, "a sparse file; pack the archive anew without tar --sparse")
        if kind == "M":
            raise self._broken(at, "a part of a multi-volume archive; join its volumes")
        self.ignored[_KINDS.get(kind, f"members of type {ascii(kind)}")] += 1
        return 0 if kind in _WITHOUT_CONTENT else size

    def _extend(self, kind: str, content: int, size: int) -> int:
        """Takes in what is said of the next member, and returns the bytes to go on by."""
        at = content - BLOCK
        if size > MAX_EXTENSION:
            raise self._broken(at, f"a name or extended header of {size} bytes")
        if content + size > self.stop:
            raise self._broken(at, f"an extended header of {size} bytes, {self.stop - content} are left: cut off")
        data = os.pread(self.handle, size, content)
        if len(data) != size:
            raise self._broken(content + len(data), "the file ends here: it was made shorter meanwhile")
        if kind == "L":
            self.name = _decoded(data.split(b"\0", 1)[0])
        elif kind != "K":
            self._take_records(data, at, is_global=kind == "g")
        return (size + BLOCK - 1) // BLOCK * BLOCK

    def _take_records(self, data: bytes, at: int, *, is_global: bool) -> None:
        position = 0
        while position < len(data) and data[position]:  # some writers fill the block with NUL
            match = _RECORD.match(data, position)
            length = int(match[1]) if match else 0
            if match is None or not match.end() - position < length <= len(data) - position:
                raise self._broken(at, f"a pax header with a malformed record at its byte {position}")
            if data[position + length - 1] != 0x0A:
                raise self._broken(at, f"a pax header whose record at its byte {position} does not end in a newline")
            key, value = match[2], data[match.end() : position + length - 1]
            position += length
            if key.startswith(b"GNU.sparse."):
                raise self._broken(at, "a sparse file; pack the archive anew without tar --sparse")
            if is_global and key in (b"path", b"size"):
                raise self._broken(at, f"a global pax header that sets {key.decode()} for all members")
            if key == b"path":
                self.name = _decoded(value)
            elif key == b"size":
                if not value.isdigit() or len(value) > 19 or int(value) > MAX_OFFSET:
                    raise self._broken(at, f"a pax header with size {value[:30]!a}")
                self.size = int(value)

    def _number(self, block: bytes, at: int) -> int:
        field = block[124:136]
        if field[:11].isdigit() and field[11] in b"\0 ":
            digits = field[:11]
        elif field[0] & 0x80:
            size = int.from_bytes(bytes((field[0] & 0x3F,)) + field[1:])
            if field[0] & 0x40 or size > MAX_OFFSET:
                raise self._broken(at, f"a size out of range: {field.hex(' ')}")
            return size
        else:
            digits = field.split(b"\0", 1)[0].strip(b" ") or b"0"
        try:
            if not digits.isdigit():
                raise ValueError
            return int(digits, 8)
        except ValueError:
            raise self._broken(at, f"a size that is no octal number: {field!a}") from None

    def _short_name(self, block: bytes) -> str:
        name = block[:100].split(b"\0", 1)[0]
        if block[257:263] == _USTAR and block[345]:  # GNU's own format keeps other things there
            name = block[345:500].split(b"\0", 1)[0] + b"/" + name
        return _decoded(name)

    def _check_sum(self, block: bytes, at: int) -> None:
        if not _checksum_is_right(block):
            known = _compression_of(block) if at == self.start else None
            if known:
                raise ShardError(
                    f"{self.path} is compressed with {known[0]}; decompress it first: {known[1]} {self.path}"
                )
            if at == self.start:
                raise ShardCorrupt(self.path, at, "no tar header here: this is no tar, or a damaged one")
            raise self._broken(at, "no tar header here (its checksum is wrong): the archive is damaged")

    def _check_end(self, at: int) -> None:
        """Accepts two zero blocks, or one at the end of the file, with nothing but zeros behind them."""
        if self.name is not None or self.size is not None:
            raise self._broken(at, "an extended header without its member: cut off")
        left = self.stop - at
        if left < BLOCK:
            if self.stop == self.start:
                raise ShardCorrupt(self.path, at, "an empty file, not even tar's end marker is there")
            head = os.pread(self.handle, max(min(left, 8), 0), at)
            if at == self.start and (known := _compression_of(head)):
                raise ShardError(
                    f"{self.path} is compressed with {known[0]}; decompress it first: {known[1]} {self.path}"
                )
            if left > 0 or at > self.stop:
                raise self._broken(min(at, self.stop), "the archive ends within a block: cut off")
            hint = f"; if nothing is missing, add it: truncate -s +{2 * BLOCK} {self.path}"
            raise self._broken(at, "the archive ends without tar's end marker: it may be cut off" + hint)
        padding = os.pread(self.handle, min(left, _PADDING_CHECKED), at)
        if len(padding) < BLOCK:
            raise self._broken(at + len(padding), "the file ends here: it was made shorter meanwhile")
        if padding.count(0) != len(padding):
            first = len(padding) - len(padding.lstrip(b"\0"))
            raise self._broken(at + first, "something follows tar's end marker: two archives in one file, or damage")

    def _broken(self, at: int, reason: str) -> ShardCorrupt:
        return ShardCorrupt(self.path, at, reason)


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _checksum_is_right(block: bytes) -> bool:
    field = block[148:156].split(b"\0", 1)[0].strip(b" ")
    if not field.isdigit() or b"8" in field or b"9" in field:
        return False
    others = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(others)
    signed = unsigned - 256 * sum(byte >= 128 for byte in others)  # as some old systems computed it
    return int(field, 8) in (unsigned, signed)
