import gzip
import logging
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from maestri.shards import images
from maestri.shards.convert import ConvertConfig, convert
from maestri.shards.errors import ShardError
from maestri.shards.images import BadImage
from maestri.shards.sources import open_source
from maestri.shards.sources.idx_file import IdxSource, read_idx
from maestri.shards.sources.image_folder import FolderSource
from maestri.shards.sources.shard_set import ShardSetSource

MakeFolder = Callable[[Path, dict[str, bytes]], Path]


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder like MNIST's: two splits, one of them gzipped."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for split, count, pack in (("train", 12, gzip.compress), ("t10k", 5, bytes)):
        suffix = ".gz" if pack is gzip.compress else ""
        pixels = np.arange(count * 12).reshape(count, 3, 4) % 256
        (folder / f"{split}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(pixels)))
        (folder / f"{split}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(np.arange(count) % 4)))
    return folder


def test_folder_listing__labels_by_first_folder_and_sorts(tmp_path: Path, make_folder: MakeFolder) -> None:
    make_folder(tmp_path, {"dog/2.jpg": b"22", "cat/deep/er/1.PNG": b"1", "cat/0.webp": b"", "dog/.x.jpg": b"hidden"})
    source = FolderSource(tmp_path)
    listing = source.listing()
    assert listing.class_names == ("cat", "dog")
    assert tuple(listing.keys) == ("cat/0", "cat/deep/er/1", "dog/2")
    assert listing.labels.tolist() == [0, 0, 1] and listing.sizes.tolist() == [0, 1, 2]
    assert listing.names[1] == "cat/deep/er/1.PNG"
    assert source.load(listing.names[1], listing.places[1]) == b"1"


def test_folder_listing__flat_has_no_labels(tmp_path: Path, make_folder: MakeFolder) -> None:
    listing = FolderSource(make_folder(tmp_path, {"b.jpg": b"1", "a.jpg": b"2"})).listing()
    assert listing.class_names == () and listing.labels.tolist() == [-1, -1] and tuple(listing.keys) == ("a", "b")


def test_folder_listing__empty_class_keeps_its_number(
    tmp_path: Path, make_folder: MakeFolder, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(tmp_path, {"c/1.jpg": b"1", "a/readme.txt": b"", "b/2.jpg": b"2"})
    with caplog.at_level(logging.WARNING):
        listing = FolderSource(tmp_path).listing()
    assert listing.class_names == ("a", "b", "c") and listing.labels.tolist() == [1, 2]
    assert "1 class folders have no images, such as a" in caplog.text
    assert "1 .txt" in caplog.text


def test_folder_listing__follows_links_but_no_circles(tmp_path: Path, make_folder: MakeFolder) -> None:
    make_folder(tmp_path / "elsewhere", {"1.jpg": b"1"})
    source = make_folder(tmp_path / "source", {"b/2.jpg": b"2"})
    (source / "a").symlink_to(tmp_path / "elsewhere")
    (source / "b" / "circle").symlink_to(source)
    assert tuple(FolderSource(source).listing().keys) == ("a/1", "b/2")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no images in"),
        ({"notes.txt": b""}, "no images in"),
        ({"1.jpg": b"", "cat/2.jpg": b""}, "images beside class folders, the first is 1.jpg"),
        ({"train/cat/1.jpg": b"", "val/cat/1.jpg": b""}, "splits .train, val., not classes; convert one by --split"),
    ],
)
def test_folder_listing__refuses(tmp_path: Path, make_folder: MakeFolder, files: dict, message: str) -> None:
    tmp_path.joinpath("source").mkdir()
    with pytest.raises(ShardError, match=message):
        open_source(make_folder(tmp_path / "source", files)).listing()


def test_folder_listing__names_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    with pytest.raises(ShardError, match=r"cannot read the source: No such file or directory: .*gone\.jpg"):
        FolderSource(tmp_path).listing()


def test_open_source__split_of_a_folder(tmp_path: Path, make_folder: MakeFolder) -> None:
    make_folder(tmp_path, {"train/cat/1.jpg": b"", "val/cat/1.jpg": b"", "val/dog/1.jpg": b""})
    assert open_source(tmp_path, split="val").listing().class_names == ("cat", "dog")
    with pytest.raises(ShardError, match="neither a folder nor an idx3 file of split 'tset'"):
        open_source(tmp_path, split="tset")


def test_open_source__idx_by_file_and_by_split(mnist: Path) -> None:
    for source in (
        open_source(mnist / "t10k-images-idx3-ubyte"),
        open_source(mnist, split="test"),
        open_source(mnist, split="t10k"),
    ):
        listing = source.listing()
        assert tuple(listing.keys) == ("0", "1", "2", "3", "4")
        assert listing.class_names == ("0", "1", "2", "3") and listing.labels.tolist() == [0, 1, 2, 3, 0]
        pixels = source.load(listing.names[1], listing.places[1])
        assert isinstance(pixels, np.ndarray) and pixels.tolist() == np.arange(12, 24).reshape(3, 4).tolist()
    assert len(open_source(mnist, split="train").listing().keys) == 12


def test_open_source__idx_without_a_choice(mnist: Path) -> None:
    with pytest.raises(ShardError, match="holds 2 idx3 files, say which: --split t10k or --split train"):
        open_source(mnist)
    with pytest.raises(ShardError, match="none is called 'val'"):
        open_source(mnist, split="val")


def test_open_source__names_what_it_takes(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(ShardError, match="is nothing that can be converted"):
        open_source(tmp_path / "x.zip")
    with pytest.raises(ShardError, match="there is no"):
        open_source(tmp_path / "nothing")


def test_idx_listing__without_labels_warns(mnist: Path, caplog: pytest.LogCaptureFixture) -> None:
    (mnist / "t10k-labels-idx1-ubyte").unlink()
    listing = IdxSource(mnist / "t10k-images-idx3-ubyte").listing()
    assert listing.labels.tolist() == [-1] * 5 and listing.class_names == ()
    assert "has no labels" in caplog.text


def test_idx_listing__digest_depends_on_pixels(mnist: Path) -> None:
    path = mnist / "t10k-images-idx3-ubyte"
    before = IdxSource(path).listing().digest()
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert IdxSource(path).listing().digest() != before


def test_idx_listing__refuses_labels_that_do_not_fit(mnist: Path) -> None:
    (mnist / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(4)))
    with pytest.raises(ShardError, match="has 4 labels for the 5 images"):
        IdxSource(mnist / "t10k-images-idx3-ubyte").listing()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an idx file"),
        (idx(np.zeros((2, 3, 3)))[:-1], "has 33 bytes; its head says 34"),
        (idx(np.zeros(4)), "is not an idx file of unsigned bytes in 3 dimensions"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), "its head says"),
        (gzip.compress(idx(np.zeros((10, 10, 10))), mtime=0)[:-9], "cannot be read"),
        (b"\x1f\x8b\x08" + bytes(20), "cannot be read"),
    ],
)
def test_read_idx__refuses_damage(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ShardError, match=message):
        read_idx(path, dimensions=3)


@pytest.mark.timeout(60)
def test_folder_listing__only_regular_files_are_images(
    tmp_path: Path, make_folder: MakeFolder, make_jpeg: Callable[..., bytes], caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(tmp_path / "source", {"a/1.jpg": make_jpeg()})
    (folder / "a" / "linked.jpg").symlink_to("1.jpg")
    os.mkfifo(folder / "a" / "pipe.jpg")
    (folder / "a" / "z.jpg").symlink_to("/dev/zero")
    with caplog.at_level(logging.WARNING):
        listing = FolderSource(folder).listing()
    assert list(listing.names) == ["a/1.jpg", "a/linked.jpg"]
    assert "2 pipes and devices" in caplog.text
    assert convert(folder, tmp_path / "set", ConvertConfig(workers=1))["tar"].num_samples == 2
    (folder / "a" / "dead.jpg").symlink_to("nowhere")
    with pytest.raises(ShardError, match=r"cannot read the source: No such file or directory: .*dead\.jpg"):
        FolderSource(folder).listing()


@pytest.mark.timeout(60)
def test_folder_load__pipe_that_stands_there_since_is_a_bad_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "1.jpg")
    with pytest.raises(BadImage, match="no regular file"):
        FolderSource(tmp_path).load("1.jpg", np.zeros(3, np.int64))


def test_load__what_is_too_large_to_be_an_image_is_not_read(
    tmp_path: Path, make_folder: MakeFolder, make_jpeg: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder, a set and a .beton; tars have a test of their own."""
    data = make_jpeg()
    folder = make_folder(tmp_path / "source", {"1.jpg": data})
    convert(folder, tmp_path / "set", ConvertConfig(workers=1, format="both"))
    beton = next((tmp_path / "set" / "beton").glob("*.beton"))
    sources = [FolderSource(folder), ShardSetSource(tmp_path / "set" / "tar"), open_source(beton)]
    listings = [source.listing() for source in sources]
    for limit in (len(data), len(data) - 1):
        monkeypatch.setattr(images, "MAX_IMAGE", limit)
        for source, listing in zip(sources, listings, strict=True):
            if limit == len(data):
                assert source.load(listing.names[0], listing.places[0]) == data
            else:
                with pytest.raises(BadImage, match=f"{len(data)} bytes, and no image has more than {limit}"):
                    source.load(listing.names[0], listing.places[0])


def test_read_idx__maps_what_is_not_gzipped(mnist: Path) -> None:
    path = mnist / "t10k-images-idx3-ubyte"
    pixels = read_idx(path, dimensions=3)
    assert isinstance(pixels, np.memmap) and not pixels.flags.writeable
    np.testing.assert_array_equal(pixels, np.arange(60, dtype=np.uint8).reshape(5, 3, 4))
    packed = mnist / "packed.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    np.testing.assert_array_equal(read_idx(packed, dimensions=3), pixels)


def test_read_idx__unpacks_no_more_than_the_head_says(mnist: Path) -> None:
    pixels = idx(np.zeros((5, 3, 4)))
    images_file, labels_file = mnist / "x-images-idx3-ubyte.gz", mnist / "x-labels-idx1-ubyte.gz"
    images_file.write_bytes(gzip.compress(pixels + bytes(1 << 28), 1))
    labels_file.write_bytes(gzip.compress(struct.pack(">4BI", 0, 0, 8, 1, 1 << 28) + bytes(1 << 28), 1))
    tracemalloc.start()
    with pytest.raises(ShardError, match=f"has more than {len(pixels)} bytes; its head says {len(pixels)}"):
        IdxSource(images_file).listing()
    images_file.write_bytes(gzip.compress(pixels))
    with pytest.raises(ShardError, match="has 268435456 labels for the 5 images"):
        IdxSource(images_file).listing()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 24
