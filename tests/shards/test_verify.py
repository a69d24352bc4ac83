"""``verify``: any byte that is not what was written is found, and said to belong to a sample."""

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from maestri.shards.convert import ConvertConfig, convert
from maestri.shards.shard_set import ShardSet
from maestri.shards.verify import damage

MakeFolder = Callable[[Path, dict[str, bytes]], Path]


@pytest.fixture(scope="module")
def both(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set in both formats."""
    out = tmp_path_factory.mktemp("both") / "set"
    convert(images, out, ConvertConfig(workers=1, shard_bytes=8000, format="both"))
    return out


@pytest.fixture
def copied(both: Path, tmp_path: Path) -> Path:
    """A set of tars that may be damaged."""
    return Path(shutil.copytree(both / "tar", tmp_path / "set"))


@pytest.fixture
def beton(both: Path, tmp_path: Path) -> Path:
    """A set of .beton files that may be damaged."""
    return Path(shutil.copytree(both / "beton", tmp_path / "set"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def lines(folder: Path, workers: int = 1) -> list[str]:
    return [str(line) for line in damage(folder, workers=workers)]


def row_of(folder: Path, row: int) -> tuple[Path, int, int, str]:
    with ShardSet.open(folder) as shard_set:
        columns = shard_set.columns
        path = shard_set.path_of(int(columns.shard[row]))
        return path, int(columns.offset[row]), int(columns.bytes[row]), shard_set.key(row)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("form", ["tar", "beton"])
def test_damage__none_in_a_whole_set(both: Path, form: str, workers: int) -> None:
    assert lines(both / form, workers) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_damage__names_shard_and_sample(copied: Path, workers: int) -> None:
    path, offset, _, key = row_of(copied, 37)
    flip(path, offset + 5)
    assert lines(copied, workers) == [f"{path}, byte {offset}: row 37 ({key}): the image's CRC-32 is wrong"]


def test_damage__names_what_lies_between_samples(copied: Path) -> None:
    path, offset, size, key = row_of(copied, 37)
    flip(path, offset - 300)
    first, second = lines(copied)
    assert first == f"{path}, byte {offset - 300}: row 37 ({key}): damaged: tar header of {key}.jpg"
    assert second.startswith(f"{path.with_suffix('.idx')}: cannot be compared with {path.name}")
    flip(path, offset - 300)
    flip(path, offset + size)
    assert lines(copied) == [f"{path}, byte {offset + size}: row 37 ({key}): damaged: padding after {key}.jpg"]


def test_damage__names_a_label(copied: Path) -> None:
    path, _, _, key = row_of(copied, 37)
    with tarfile.open(path) as archive:
        at = archive.getmember(f"{key}.cls").offset_data
    flip(path, at)
    assert lines(copied) == [f"{path}, byte {at}: row 37 ({key}): damaged: content of {key}.cls"]


def test_damage__at_the_end_of_a_tar(copied: Path) -> None:
    path = copied / "shard-00001.tar"
    flip(path, -1)
    assert f"{path}, byte {path.stat().st_size - 1}: damaged: end of the tar" in lines(copied)


def test_damage__in_a_dali_index(copied: Path) -> None:
    flip(copied / "shard-00001.idx", 30)
    (line,) = lines(copied)
    assert line.startswith(f"{copied / 'shard-00001.idx'}: not the index of shard-00001.tar")


def test_damage__a_missing_dali_index(copied: Path) -> None:
    (copied / "shard-00001.idx").unlink()
    (line,) = lines(copied)
    assert line.startswith(f"{copied / 'shard-00001.idx'}: it is missing")


def test_damage__in_the_index_names_column_and_sample(copied: Path) -> None:
    with ShardSet.open(copied) as shard_set:
        layout, key = shard_set.manifest.index["columns"], shard_set.key(20)
    flip(copied / "index.bin", layout["crc32"]["offset"] + 4 * 20)
    first, second = lines(copied)
    assert first.startswith(f"{copied / 'index.bin'}: its checksum is not the manifest's")
    assert f"row 20 ({key}): 'crc32' is " in second


def test_damage__a_flipped_byte_anywhere(both: Path, tmp_path: Path) -> None:
    """Every file but the list of images left out, which describes the source, at many bytes."""
    for form in ("tar", "beton"):
        folder = Path(shutil.copytree(both / form, tmp_path / form))
        for path in sorted(folder.iterdir()):
            if path.name == "quarantine.jsonl" or "00002" in path.name or "00003" in path.name:
                continue
            whole = path.read_bytes()
            for at in np.linspace(0, len(whole) - 1, 25).astype(int).tolist():
                flip(path, at)
                found = lines(folder)
                assert any(path.name in line for line in found), f"{path}, byte {at}: {found}"
                path.write_bytes(whole)
        assert lines(folder) == []


def test_damage__of_a_beton_names_the_sample(beton: Path) -> None:
    path, offset, _, key = row_of(beton, 37)
    flip(path, offset + 5)
    (line,) = lines(beton)
    assert str(path) in line
    assert key in line


def test_damage__missing_and_surplus_shards(copied: Path) -> None:
    (copied / "shard-00001.tar").unlink()
    shutil.copy(copied / "shard-00000.tar", copied / "shard-00009.tar")
    assert sorted(lines(copied)) == [
        f"{copied / 'shard-00001.tar'}: the shard is missing",
        f"{copied / 'shard-00009.tar'}: this shard is not in the manifest",
    ]


@pytest.mark.parametrize("size", [0, 100, 1024, 5000])
def test_damage__a_shard_cut_short(copied: Path, size: int) -> None:
    path = copied / "shard-00001.tar"
    expected = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size)
    assert f"{path}, byte {size}: it has {size} bytes; the manifest says {expected}" in lines(copied)


def test_damage__without_an_index_shards_are_still_read(copied: Path) -> None:
    (copied / "index.bin").unlink()
    flip(copied / "shard-00001.tar", 2000)
    found = lines(copied)
    assert found[0].startswith(f"{copied / 'index.bin'}: No such file")
    assert any("shard-00001.tar" in line for line in found[1:])


def test_damage__without_a_manifest(copied: Path) -> None:
    (copied / "manifest.json").unlink()
    (line,) = lines(copied)
    assert line.startswith(str(copied / "manifest.json"))


def test_damage__of_several_labels_and_no_labels(
    make_folder: MakeFolder, make_jpeg: Callable[..., bytes], tmp_path: Path
) -> None:
    source = make_folder(tmp_path / "source", {f"{number}.jpg": make_jpeg(seed=number) for number in range(4)})
    convert(source, tmp_path / "set", ConvertConfig(workers=1))
    assert lines(tmp_path / "set") == []
    path, offset, _, key = row_of(tmp_path / "set", 2)
    flip(path, offset - 1)
    assert any(f"row 2 ({key}): damaged: tar header of {key}.jpg" in line for line in lines(tmp_path / "set"))
