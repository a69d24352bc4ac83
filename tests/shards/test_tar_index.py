"""Archives by GNU tar, Python and by hand; whole, cut off, damaged and hostile."""

import io
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from maestri.shards.errors import ShardCorrupt, ShardError
from maestri.shards.sources.tar_index import BLOCK, tar_members

LONG = "/".join(("folder" * 12, "second" * 14, "third" * 12, "x" * 120 + ".jpg"))
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def contents_of(path: Path) -> dict[str, bytes]:
    """Returns what lies where the members are said to lie."""
    data = path.read_bytes()
    return {name: data[offset : offset + size] for name, offset, size in tar_members(path)}


def header(name: str, size: int, *, kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytes:
    """Returns a header with a right checksum."""
    block = bytearray(BLOCK)
    block[: len(name)] = name.encode()
    block[124:136] = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11)
    block[156:157] = kind
    block[257 : 257 + len(magic)] = magic
    return with_checksum(bytes(block))


def with_checksum(block: bytes) -> bytes:
    """Returns a header whose checksum was made right."""
    blank = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(blank) + block[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def written(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts) + bytes(2 * BLOCK))
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """Files below ``tree``: empty, of exactly one block, with blanks and accents."""
    found = {"a.jpg": b"", "b/one block.png": bytes(512), "b/é.jpg": b"accent" * 200, "c.cls": b"7"}
    for name, content in found.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return found


@pytest.mark.parametrize("format_name", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_tar_members__gnu_tar_in_each_format(tmp_path: Path, files: dict[str, bytes], format_name: str) -> None:
    if format_name != "v7":
        long = tmp_path / "tree" / ("d" * 90) / ("e" * 60 + ".jpg")
        long.parent.mkdir()
        long.write_bytes(b"long")
        files[f"{'d' * 90}/{'e' * 60}.jpg"] = b"long"
    path = tmp_path / "x.tar"
    subprocess.run(["tar", f"--format={format_name}", "-C", tmp_path / "tree", "-cf", path, "."], check=True)
    folders: set[str] = set()
    names = {name for name, _, _ in tar_members(path, folders=folders)}
    assert contents_of(path) == {f"./{name}": content for name, content in files.items()}
    assert "./b" in folders and names.isdisjoint(folders)


@pytest.mark.parametrize("format_name", ["gnu", "posix"])
def test_tar_members__names_of_any_length(tmp_path: Path, format_name: str) -> None:
    path = tmp_path / "tree" / LONG
    path.parent.mkdir(parents=True)
    path.write_bytes(b"content")
    archive = tmp_path / "x.tar"
    subprocess.run(["tar", f"--format={format_name}", "-C", tmp_path / "tree", "-cf", archive, LONG], check=True)
    assert contents_of(archive) == {LONG: b"content"}


@pytest.mark.parametrize("format_name", FORMATS)
def test_tar_members__as_python_reads_it(tmp_path: Path, files: dict[str, bytes], format_name: str) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=FORMATS[format_name]) as archive:
        archive.add(tmp_path / "tree", "tree")
    with tarfile.open(path) as archive:
        theirs = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    assert list(tar_members(path)) == theirs and len(theirs) == len(files)


def test_tar_members__name_that_is_no_utf8(tmp_path: Path) -> None:
    block = bytearray(header("x.jpg", 0))
    block[0] = 0xFF
    path = written(tmp_path / "x.tar", with_checksum(bytes(block)))
    assert [name.encode("utf-8", "surrogateescape") for name, _, _ in tar_members(path)] == [b"\xff.jpg"]


def test_tar_members__hostile_names_are_only_text(tmp_path: Path) -> None:
    names = ["../../x.jpg", "/etc/x.jpg", "a/../../x.jpg"]
    path = written(tmp_path / "x.tar", *(header(name, 0) for name in names))
    assert [name for name, _, _ in tar_members(path)] == names
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar"]


def test_tar_members__links_and_devices_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.SYMTYPE):
            info = tarfile.TarInfo("x.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        archive.addfile(tarfile.TarInfo("real.jpg"))
    ignored = Counter[str]()
    assert [name for name, _, _ in tar_members(path, ignored)] == ["real.jpg"]
    assert ignored == {"symbolic links": 2, "hard links": 1, "character devices": 1, "pipes": 1}


def test_tar_members__base_256_size_in_a_sparse_file(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    size = 9 << 30
    with path.open("wb") as file:
        file.write(header("big.bin", size))
        file.seek(size, io.SEEK_CUR)
        file.write(header("small.jpg", 3) + padded(b"abc") + bytes(2 * BLOCK))
    assert list(tar_members(path)) == [("big.bin", BLOCK, size), ("small.jpg", size + 2 * BLOCK, 3)]


def test_tar_members__pax_size_beats_the_header(tmp_path: Path) -> None:
    record = b"13 size=1000\n"
    assert len(record) == 13
    path = written(
        tmp_path / "x.tar", header("p", 13, kind=b"x"), padded(record), header("a.jpg", 0), padded(bytes(1000))
    )
    assert list(tar_members(path)) == [("a.jpg", 3 * BLOCK, 1000)]


def test_tar_members__signed_checksums_of_old_systems(tmp_path: Path) -> None:
    block = bytearray(header("x.jpg", 0))
    block[0:2] = "é".encode()
    blank = bytes(block[:148]) + b" " * 8 + bytes(block[156:])
    signed = sum(byte - 256 if byte > 127 else byte for byte in blank)
    block[148:156] = b"%06o\0 " % signed
    path = written(tmp_path / "x.tar", bytes(block))
    assert [name for name, _, _ in tar_members(path)] == ["éjpg"]


def test_tar_members__empty_archive_has_none(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    tarfile.open(path, "w").close()
    assert list(tar_members(path)) == []


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Two members; contents at 512 and 2048."""
    return written(
        tmp_path / "whole.tar", header("a.jpg", 700), padded(bytes(700)), header("b.jpg", 600), padded(b"b" * 600)
    )


CUTS = [
    (0, 0, "empty file"), (100, 0, "cut off"), (600, 0, "700 bytes, 88 are left"), (1400, 1024 + 376, "within a block"),
    (1536 + 100, 1536, "within a block"), (1536 + 512 + 50, 1536, "cut off"), (1536, 1536, "end marker"),
    (3072, 3072, "truncate -s"),
]  # fmt: skip


@pytest.mark.parametrize(("length", "at", "reason"), CUTS)
def test_tar_members__cut_off_anywhere(tmp_path: Path, whole: Path, length: int, at: int, reason: str) -> None:
    path = tmp_path / "cut.tar"
    path.write_bytes(whole.read_bytes()[:length])
    with pytest.raises(ShardCorrupt, match=reason) as caught:
        list(tar_members(path))
    assert caught.value.path == path and caught.value.offset == at


def test_tar_members__one_zero_block_at_the_end_is_enough(tmp_path: Path, whole: Path) -> None:
    path = tmp_path / "short.tar"
    path.write_bytes(whole.read_bytes()[:-BLOCK])
    assert len(list(tar_members(path))) == 2


def test_tar_members__hint_for_a_missing_end_works(tmp_path: Path, whole: Path) -> None:
    path = tmp_path / "short.tar"
    path.write_bytes(whole.read_bytes()[: -2 * BLOCK])
    with pytest.raises(ShardError, match="truncate") as caught:
        list(tar_members(path))
    subprocess.run(str(caught.value).partition("add it: ")[2].split(), check=True)
    assert len(list(tar_members(path))) == 2


def test_tar_members__second_archive_behind_the_first(tmp_path: Path, whole: Path) -> None:
    path = tmp_path / "two.tar"
    path.write_bytes(whole.read_bytes() * 2)
    with pytest.raises(ShardCorrupt, match="two archives in one file") as caught:
        list(tar_members(path))
    assert caught.value.offset == whole.stat().st_size


@pytest.mark.parametrize("at", [0, 130, 150, 300])
def test_tar_members__flipped_bit_in_a_header(tmp_path: Path, whole: Path, at: int) -> None:
    data = bytearray(whole.read_bytes())
    data[1536 + at] ^= 4
    path = written(tmp_path / "flipped.tar", bytes(data))
    with pytest.raises(ShardCorrupt, match="checksum is wrong") as caught:
        list(tar_members(path))
    assert caught.value.offset == 1536


BAD_SIZES = {
    b"zzzzzzzzzzz\0": "no octal number", b"0000000009 \0": "no octal number", b"-0000000001\0": "no octal number",
    b"\xff" * 12: "out of range", b"\x80" + b"\xff" * 11: "out of range", b"77777777777\0": "cut off",
    b"\x80" + bytes(4) + b"\x7f" + bytes(6): "cut off",
}  # fmt: skip


@pytest.mark.parametrize("field", BAD_SIZES)
def test_tar_members__absurd_sizes(tmp_path: Path, field: bytes) -> None:
    block = header("x.jpg", 0)
    path = written(tmp_path / "x.tar", with_checksum(block[:124] + field + block[136:]))
    with pytest.raises(ShardCorrupt, match=BAD_SIZES[field]):
        list(tar_members(path))


BAD_PAX = {
    b"99 path=x\n": "malformed record", b"0 path=x\n": "malformed record", b"path=x\n": "malformed record",
    b"9 path=x\n\n9 path": "malformed record", b"10 path=xxx\n": "newline",
    b"12 size=-10\n": "size", b"29 size=99999999999999999999\n": "size", b"22 GNU.sparse.major=1\n": "sparse",
}  # fmt: skip


@pytest.mark.parametrize("records", BAD_PAX)
def test_tar_members__malformed_pax_headers(tmp_path: Path, records: bytes) -> None:
    parts = header("p", len(records), kind=b"x"), padded(records), header("x.jpg", 0)
    with pytest.raises(ShardCorrupt, match=BAD_PAX[records]):
        list(tar_members(written(tmp_path / "x.tar", *parts)))


def test_tar_members__sparse_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "hole.jpg").write_bytes(b"")
    with (tmp_path / "hole.jpg").open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"end")
    for number, options in enumerate(
        (["--format=gnu"], ["--format=posix"], ["--format=posix", "--sparse-version=0.1"])
    ):
        path = tmp_path / f"{number}.tar"
        subprocess.run(["tar", "--sparse", *options, "-C", tmp_path, "-cf", path, "hole.jpg"], check=True)
        with pytest.raises(ShardCorrupt, match="without tar --sparse"):
            list(tar_members(path))


@pytest.mark.parametrize(
    ("command", "hint"), [("gzip", "gunzip -k"), ("xz", "unxz -k"), ("bzip2", "bunzip2 -k"), ("zstd", "unzstd")]
)
def test_tar_members__compressed_archives_say_how_to_go_on(
    tmp_path: Path, whole: Path, command: str, hint: str
) -> None:
    path = tmp_path / "x.tar.z"
    if command == "zstd":
        path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    else:
        path.write_bytes(subprocess.run([command, "-c", whole], check=True, capture_output=True).stdout)
    with pytest.raises(ShardError, match=f"compressed with {command}; decompress it first: {hint} {path}"):
        list(tar_members(path))


def test_tar_members__extended_header_without_its_member(tmp_path: Path) -> None:
    path = written(tmp_path / "x.tar", header("p", 9, kind=b"x"), padded(b"9 path=x\n"))
    with pytest.raises(ShardCorrupt, match="without its member"):
        list(tar_members(path))


def test_tar_members__huge_long_name_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(header("././@LongLink", 1 << 40, kind=b"L", magic=b"ustar  \0"))
    with path.open("r+b") as file:
        file.truncate(1 << 41)
    with pytest.raises(ShardCorrupt, match="extended header of 1099511627776 bytes"):
        list(tar_members(path))


def test_tar_members__archive_within_a_file(tmp_path: Path, whole: Path) -> None:
    inner = whole.read_bytes()
    path = tmp_path / "outer.bin"
    path.write_bytes(b"x" * 1000 + inner + b"y" * 1000)
    found = list(tar_members(path, start=1000, end=1000 + len(inner)))
    assert [(name, offset - 1000, size) for name, offset, size in found] == list(tar_members(whole))
    with pytest.raises(ShardCorrupt, match="the file ends"):
        list(tar_members(path, start=1000, end=99999))
