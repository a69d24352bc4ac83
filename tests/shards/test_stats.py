"""``stats``: numbers that can be counted by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maestri.shards.convert import ConvertConfig, convert
from maestri.shards.shard_set import ShardSet
from maestri.shards.stats import stats

MakeFolder = Callable[[Path, dict[str, bytes]], Path]
MakeJpeg = Callable[..., bytes]


@pytest.fixture
def small(make_folder: MakeFolder, make_jpeg: MakeJpeg, encode: Callable[..., bytes], tmp_path: Path) -> Path:
    files = {f"cat/{number}.jpg": make_jpeg(20 + 10 * number, 40, seed=number) for number in range(5)}
    files["cat/again.jpg"] = files["cat/0.jpg"]
    files["dog/the same.jpg"] = files["cat/1.jpg"]
    files["dog/drawn.png"] = encode(Image.new("RGB", (10, 10), (255, 0, 51)), "PNG")
    (tmp_path / "source" / "owl").mkdir(parents=True)
    convert(make_folder(tmp_path / "source", files), tmp_path / "set", ConvertConfig(workers=1))
    return tmp_path / "set"


def test_stats__of_the_index(small: Path) -> None:
    with ShardSet.open(small) as shard_set:
        found = stats(shard_set)
        sizes = np.array(shard_set.columns.bytes)
    assert found["images"] == 8
    assert found["bytes"] == sizes.sum()
    assert found["classes"] == {
        "number": 3, "without_label": 0, "min": 0, "median": 2.0, "max": 6,
        "smallest": {"owl": 0, "dog": 2, "cat": 6}, "largest": {"cat": 6, "dog": 2, "owl": 0},
    }  # fmt: skip
    assert found["width"]["0"] == 10
    assert found["width"]["100"] == 60
    assert found["width"]["50"] == 30
    assert found["aspect"]["100"] == 1.5
    assert found["megapixels"]["0"] == 0.0001
    assert found["stored"] == {"kept": 7, "transcoded": 1}
    assert found["orientations"] == {"1": 8}
    assert "pixels" not in found


def test_stats__duplicates_and_those_that_contradict(small: Path) -> None:
    with ShardSet.open(small) as shard_set:
        found = stats(shard_set)["duplicates"]
    assert (found["groups"], found["surplus_images"], found["groups_with_differing_labels"]) == (2, 2, 1)
    assert sorted(map(sorted, found["first"])) == [["cat/0", "cat/again"], ["cat/1", "dog/the%20same"]]
    assert found["first_with_differing_labels"] == [{"cat/1": ["cat"], "dog/the%20same": ["dog"]}]


def test_stats__pixels_are_those_that_pillow_decodes(whole: Path) -> None:
    import io

    with ShardSet.open(whole) as shard_set:
        found = stats(shard_set, num_pixels=1000, workers=2)["pixels"]
        images = [Image.open(io.BytesIO(data)) for data in shard_set.read(np.arange(60))]
    pixels = np.concatenate([np.asarray(image, np.float64).reshape(-1, 3) / 255 for image in images])
    assert found["images"] == 60
    np.testing.assert_allclose(found["mean"], pixels.mean(0), atol=2e-6)
    np.testing.assert_allclose(found["std"], pixels.std(0), atol=2e-6)


def test_stats__without_labels(make_folder: MakeFolder, make_jpeg: Callable[..., bytes], tmp_path: Path) -> None:
    convert(make_folder(tmp_path / "source", {"1.jpg": make_jpeg()}), tmp_path / "set", ConvertConfig(workers=1))
    with ShardSet.open(tmp_path / "set") as shard_set:
        found = stats(shard_set, num_pixels=1)
    assert found["classes"] == {"number": 0}
    assert found["duplicates"]["groups"] == 0
