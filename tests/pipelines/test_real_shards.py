"""The loader over a ShardSet on disk, and over one that is damaged while it is open."""

import io
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maestri.pipelines import cli
from maestri.pipelines.config import DataConfig
from maestri.pipelines.loader import Loader
from maestri.pipelines.reader import TooManyBadSamples
from maestri.pipelines.views import GLOBAL, ViewsConfig
from maestri.shards import index
from maestri.shards.convert import ConvertConfig, convert
from maestri.shards.manifest import Manifest, ShardInfo
from maestri.shards.shard_set import ShardSet


@pytest.fixture
def folder(make_photos: Callable, tmp_path: Path) -> Path:
    """Returns a set of forty images in two shards, which are the images' bytes back to back."""
    fake = make_photos(40, smallest=28, largest=60)
    folder = tmp_path / "shards"
    folder.mkdir()
    halves = (fake.encoded[:20], fake.encoded[20:])
    sizes = np.array([len(data) for data in fake.encoded])
    keys = [fake.key(row).encode() for row in range(40)]
    layout = index.layout_of(40, key_bytes=len(b"".join(keys)))
    draft = index.IndexDraft(folder / index.FILE_NAME, 40, layout)
    draft.add(
        {
            "shard": np.repeat([0, 1], 20),
            "offset": np.concatenate([np.cumsum(part) - part for part in (sizes[:20], sizes[20:])]),
            "bytes": sizes,
            "width": fake.columns.width,
            "height": fake.columns.height,
            "orientation": np.ones(40),
            "stored": np.zeros(40),
            "label": fake.columns.label,
            "crc32": np.array([zlib.crc32(data) for data in fake.encoded]),
            "key_bytes": np.array([len(key) for key in keys]),
            "keys": np.frombuffer(b"".join(keys), np.uint8),
        }
    )
    draft.close()
    shards = []
    for number, half in enumerate(halves):
        (folder / f"{number}.bin").write_bytes(b"".join(half))
        shards.append(ShardInfo(name=f"{number}.bin", bytes=sum(map(len, half)), num_samples=20, xxh128=""))
    Manifest(
        source={},
        format="tar",
        labels="class",
        class_names=(),
        num_samples=40,
        num_quarantined=0,
        images={},
        seed=0,
        shards=tuple(shards),
        index={"columns": layout},
        recipe="",
    ).write(folder)
    return folder


def _loader(shard_set: ShardSet, max_bad: int = 0) -> Loader:
    return Loader(
        shard_set,
        config=DataConfig(shards="", max_bad=max_bad),
        views=ViewsConfig(size=28),
        patch=4,
        seed=5,
        rank=0,
        world_size=1,
        global_size=20,
        device=torch.device("cpu"),
    )


def test_loader__reads_a_set_on_disk(folder: Path) -> None:
    with ShardSet.open(folder) as shard_set, _loader(shard_set) as loader:
        batches = [next(loader), next(loader)]
        rows = torch.cat([batch.rows for batch in batches])
    assert sorted(rows.tolist()) == list(range(40))
    assert torch.cat([batch.labels for batch in batches]).tolist() == (rows % 10).tolist()
    assert batches[0].views[GLOBAL].float().std() > 10


def test_loader__every_format_gives_the_same_batches(make_photos: Callable, tmp_path: Path) -> None:
    """Tar and .beton from one pass, and PNGs that were kept as they are."""
    fake = make_photos(40, kind="4:4:4", smallest=28, largest=60)
    for row, data in enumerate(fake.encoded):
        path = tmp_path / "source" / f"{row % 3}" / f"{row:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(io.BytesIO(data)).save(path)
    convert(tmp_path / "source", tmp_path / "jpeg", ConvertConfig(workers=1, format="both", shard_samples=16))
    convert(tmp_path / "source", tmp_path / "png", ConvertConfig(workers=1, lossless=True, shard_samples=16))
    batches = []
    for name in ("jpeg/tar", "jpeg/beton", "png"):
        with ShardSet.open(tmp_path / name) as shard_set, _loader(shard_set) as loader:
            batches.append(next(loader))
    tar, beton, png = batches
    assert torch.equal(tar.views[GLOBAL], beton.views[GLOBAL])
    assert torch.equal(tar.labels, beton.labels) and torch.equal(tar.labels, png.labels)
    difference = (tar.views[GLOBAL].float() - png.views[GLOBAL].float()).abs()
    assert 0 < difference.mean() < 1, "JPEGs of quality 100 are nearly, and not quite, the PNGs"


def test_loader__flipped_bit_on_disk(folder: Path) -> None:
    with ShardSet.open(folder) as shard_set, _loader(shard_set, max_bad=1) as loader:
        path, offset = folder / "1.bin", int(shard_set.columns.offset[25]) + 99
        data = bytearray(path.read_bytes())
        data[offset] ^= 4
        path.write_bytes(data)
        rows = torch.cat([next(loader).rows, next(loader).rows]).tolist()
        assert loader.num_bad == 1
    assert 25 not in rows
    assert rows.count(26) == 2


def test_loader__shard_cut_short_while_open(folder: Path) -> None:
    with ShardSet.open(folder) as shard_set, _loader(shard_set, max_bad=5) as loader:
        os.truncate(folder / "1.bin", 0)
        with pytest.raises(TooManyBadSamples, match="6 bad samples"):
            for _ in range(4):
                next(loader)


def test_loader__shard_deleted_while_open(folder: Path) -> None:
    with ShardSet.open(folder) as shard_set, _loader(shard_set, max_bad=5) as loader:
        (folder / "1.bin").unlink()
        with pytest.raises(FileNotFoundError, match=r"1\.bin"):
            next(loader)


def test_show__set_on_disk(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "views.png"
    assert cli.run(["show", str(folder), "--out", str(out), "--patch", "4", "--views.size", "28"]) == 0
    assert out.stat().st_size > 1000


def test_show__no_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["show", str(tmp_path / "nothing")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nothing" in error
