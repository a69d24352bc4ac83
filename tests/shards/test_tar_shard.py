"""Our tars read by webdataset and by DALI."""

import gc
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def

from maestri.shards.convert import ConvertConfig, convert
from maestri.shards.shard_set import ShardSet

MakeJpeg = Callable[..., bytes]
MakeFolder = Callable[[Path, dict[str, bytes]], Path]


@pytest.fixture(scope="module")
def odd_names(make_jpeg: MakeJpeg, make_folder: MakeFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a set whose files have the names that break readers."""
    names = [
        "a class/with blanks.jpg", "a class/v1.2 final.jpg", "a class/été 日本.jpg", "a class/50%.jpg",
        "a class/deep/er/picture.JPEG", "a class/same.jpg", "a class/same.png", "a.b/c.d.jpg",
        f"a.b/{'long' * 30}.jpg", f"a.b/{'l' * 200}/{'é' * 90}.jpg", "__x__/y.jpg",
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("odd names")
    files = {name: make_jpeg(seed=at) for at, name in enumerate(names)}
    source = make_folder(folder / "source", files)
    convert(source, folder / "set", ConvertConfig(workers=1, shard_bytes=3000))
    return folder / "set"


def by_webdataset(folder: Path) -> list[tuple[str, bytes, int]]:
    """Returns key, bytes and label of each sample, as webdataset reads them."""
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves shards to the garbage collector
        samples = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
        found = [(sample["__key__"], sample["jpg"], int(sample["cls"])) for sample in samples]
        del samples
        gc.collect()
    return found


def by_dali(folder: Path) -> list[tuple[bytes, int]]:
    """Returns bytes and label of each sample, as DALI reads them."""
    shards = sorted(folder.glob("*.tar"))

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def read() -> tuple[object, ...]:
        return tuple(
            fn.readers.webdataset(
                paths=[str(path) for path in shards], index_paths=[str(path.with_suffix(".idx")) for path in shards],
                ext=["jpg", "cls"], missing_component_behavior="error", name="reader",
            )
        )  # fmt: skip

    pipe = read()
    pipe.build()
    found = []
    for _ in range(pipe.epoch_size("reader")):
        image, label = pipe.run()
        found.append((np.asarray(image[0]).tobytes(), int(np.asarray(label[0]).tobytes())))
    return found


def ours(folder: Path) -> list[tuple[str, bytes, int]]:
    """Returns key, bytes and label of each sample, as we read them."""
    with ShardSet.open(folder) as shard_set:
        rows = np.arange(len(shard_set))
        keys = [shard_set.key(row) for row in range(len(shard_set))]
        return list(zip(keys, shard_set.read_checked(rows), shard_set.label(rows).tolist(), strict=True))


@pytest.mark.parametrize("name", ["whole", "odd_names"])
def test_write_tar__webdataset_reads_it(request: pytest.FixtureRequest, name: str) -> None:
    folder = request.getfixturevalue(name)
    assert by_webdataset(folder) == ours(folder)


@pytest.mark.parametrize("name", ["whole", "odd_names"])
def test_dali_index__dali_reads_it(request: pytest.FixtureRequest, name: str) -> None:
    folder = request.getfixturevalue(name)
    assert by_dali(folder) == [(data, label) for _, data, label in ours(folder)]


def test_dali_index__is_what_wds2idx_writes(whole: Path, tmp_path: Path) -> None:
    tar = whole / "shard-00000.tar"
    expected = tmp_path / "expected.idx"
    command = [Path(sys.executable).parent / "wds2idx", tar, expected]
    subprocess.run(command, check=True, capture_output=True)
    assert tar.with_suffix(".idx").read_text() == expected.read_text()


def test_keys__are_unique_and_without_dots(odd_names: Path) -> None:
    keys = [key for key, _, _ in ours(odd_names)]
    assert len(set(keys)) == len(keys) == 11
    assert not any("." in key or " " in key for key in keys)


def test_write_tar__members_have_no_time_nor_owner(whole: Path) -> None:
    with tarfile.open(whole / "shard-00000.tar") as archive:
        for member in archive:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


def test_write_tar__no_labels_no_cls_member(make_jpeg: MakeJpeg, make_folder: MakeFolder, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "flat", {f"{at}.jpg": make_jpeg(seed=at) for at in range(3)})
    convert(source, tmp_path / "set", ConvertConfig(workers=1))
    with tarfile.open(tmp_path / "set" / "shard-00000.tar") as archive:
        assert sorted(archive.getnames()) == ["0.jpg", "1.jpg", "2.jpg"]


def test_dali_index__shard_without_a_good_image_does_not_stop_dali(
    make_jpeg: MakeJpeg, make_folder: MakeFolder, tmp_path: Path
) -> None:
    """DALI refuses an index without samples."""
    files = {f"c/{at:02d}.jpg": make_jpeg(seed=at) if at % 4 == 0 else b"bad" * 400 for at in range(20)}
    source = make_folder(tmp_path / "source", files)
    manifest = convert(source, tmp_path / "set", ConvertConfig(workers=1, shard_bytes=1000))["tar"]
    assert manifest.num_samples == 5
    assert manifest.num_quarantined == 15
    assert len(manifest.shards) <= 5
    assert all(shard.num_samples for shard in manifest.shards)
    assert sorted(path.name for path in (tmp_path / "set").glob("*.tar")) == [shard.name for shard in manifest.shards]
    assert len(list((tmp_path / "set").glob("*.idx"))) == len(manifest.shards)
    assert by_dali(tmp_path / "set") == [(data, label) for _, data, label in ours(tmp_path / "set")]
    assert by_webdataset(tmp_path / "set") == ours(tmp_path / "set")
