import shutil
from pathlib import Path

import pytest

from maestri.shards.shard_set import ShardSet
from maestri.shards.verify import damage


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A set that may be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "set"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def found(folder: Path) -> list[str]:
    with ShardSet.open(folder) as shard_set:
        return list(damage(shard_set))


def test_damage__none_in_a_whole_set(whole: Path) -> None:
    assert found(whole) == []


def test_damage__names_shard_and_sample(copied: Path) -> None:
    with ShardSet.open(copied) as shard_set:
        row = 37
        name = shard_set.manifest.shards[shard_set.columns.shard[row]].name
        offset, key = int(shard_set.columns.offset[row]), shard_set.key(row)
    flip(copied / name, offset + 5)
    lines = found(copied)
    assert lines == [f"{copied / name}, byte {offset}: CRC-32 of {key} is wrong"]


def test_damage__between_images(copied: Path) -> None:
    flip(copied / "shard-00001.tar", -1)
    assert found(copied) == [
        f"{copied / 'shard-00001.tar'}: its SHA-256 is not the manifest's, but its images are whole"
    ]


def test_damage__in_a_dali_index(copied: Path) -> None:
    flip(copied / "shard-00001.idx", 30)
    assert found(copied) == [f"{copied / 'shard-00001.idx'}: not the index of shard-00001.tar"]


@pytest.mark.parametrize("at", [100, -1])
def test_damage__in_the_index(copied: Path, at: int) -> None:
    flip(copied / "index.bin", at)
    assert f"{copied / 'index.bin'}: its SHA-256 is not the manifest's" in found(copied)
