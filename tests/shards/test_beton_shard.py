"""Our files, read by FFCV itself and by us."""

import contextlib
import ctypes
import io
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from ffcv.reader import Reader
from numpy.typing import NDArray
from PIL import Image

from maestri.shards import beton_shard
from maestri.shards.beton_format import Beton
from maestri.shards.beton_rows import damage, our_block
from maestri.shards.beton_shard import HEAD_BYTES, PAGE_BYTES, BetonShard
from maestri.shards.errors import ShardError
from maestri.shards.images import store
from maestri.shards.rows import Sample
from maestri.shards.sources.beton import BetonSource

MakeJpeg = Callable[..., bytes]
Pairs = list[tuple[NDArray[np.uint8], NDArray[Any]]]
ByFfcv = Callable[..., Pairs]
SIDE = 32
"""Pixels of each image's shorter side: crops of that size are not resized, so FFCV's pixels can be compared exactly."""
_EXIF = Image.Exif()
_EXIF[274] = 6


def sample(at: int, data: bytes, label: int | None = None, **fields: Any) -> Sample:
    return Sample(key=f"folder/{at:04d}", label=at if label is None else label, image=store(data), **fields)


def write_beton(path: Path, samples: Iterable[Sample], **settings: Any) -> BetonShard:
    """Writes a file and returns what was known of it as it was closed."""
    with BetonShard(path, **settings) as shard:
        for one in samples:
            shard.add(one)
    return shard


def read_rows(path: Path) -> dict[str, NDArray[Any]]:
    """Returns the columns of a file as its writer left them."""
    block = our_block(Beton(path))
    assert block is not None
    return block.columns


def of_size(data: bytes, size: int) -> bytes:
    """Returns a JPEG with zeros behind its end, which decoders ignore."""
    return data + bytes(size - len(data))


def decoded(data: bytes) -> NDArray[np.uint8]:
    """Returns RGB pixels as libjpeg-turbo makes them with the fast transform, which FFCV asks for."""
    width, height = Image.open(io.BytesIO(data)).size
    library = ctypes.CDLL("libturbojpeg.so.0")
    library.tjInitDecompress.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(library.tjInitDecompress())
    pixels = np.zeros((height, width, 3), np.uint8)
    rgb, fast = 0, 2048
    failed = library.tjDecompress2(
        handle, data, ctypes.c_ulong(len(data)), ctypes.c_void_p(pixels.ctypes.data), width, 0, height, rgb, fast
    )
    library.tjDestroy(handle)
    assert not failed
    return pixels


def middle(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns the square that FFCV cuts from the middle."""
    top, left = (pixels.shape[0] - SIDE) // 2, (pixels.shape[1] - SIDE) // 2
    return pixels[top : top + SIDE, left : left + SIDE]


@pytest.fixture(scope="module")
def by_ffcv(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ByFfcv]:
    """Returns pixels and label array of each sample, in the order of FFCV's loader."""
    out = tmp_path_factory.mktemp("ffcv") / "batches.npz"
    command = [sys.executable, str(Path(__file__).with_name("ffcv_loader.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def load(path: Path, decoder: str, *, os_cache: bool, order: str) -> Pairs:
            request = {"path": str(path), "decoder": decoder, "os_cache": os_cache, "order": order, "out": str(out)}
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            assert process.stdout.readline().strip() == str(out)
            with np.load(out) as found:
                return list(zip(found["pixels"], found["labels"], strict=True))

        yield load
        process.stdin.close()


@pytest.fixture(scope="module")
def jpegs(make_jpeg: MakeJpeg) -> list[bytes]:
    """Files of every kind that is stored as it is, 60 kB each so that they fill several pages."""
    kinds: list[dict[str, Any]] = [
        {}, {"mode": "L"}, {"progressive": True}, {"exif": _EXIF}, {"icc_profile": b"profile" * 99},
        {"subsampling": 0}, {"quality": 100}, {"mode": "L", "progressive": True}, {"comment": b"comment" * 999},
    ]  # fmt: skip
    files = []
    for at in range(100):
        longer = SIDE + 2 * (at % 20)  # where it is one pixel more, FFCV cuts at random
        width, height = (longer, SIDE) if at % 2 else (SIDE, longer)
        files.append(of_size(make_jpeg(width, height, seed=at, **kinds[at % len(kinds)]), 60_000 + at))
    return files


@contextlib.contextmanager
def small_pages() -> Iterator[None]:
    """Makes pages as small as FFCV allows, so that a small file has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beton_shard, "PAGE_BYTES", 1 << 21)
        yield


@pytest.fixture(scope="module")
def mixed(jpegs: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many sizes on four pages; the label is the row."""
    path = tmp_path_factory.mktemp("beton") / "mixed.beton"
    with small_pages():
        samples = (sample(at, data) for at, data in enumerate(jpegs))
        write_beton(path, samples, class_names=[str(at) for at in range(100)])
    return path


@pytest.mark.parametrize(
    ("decoder", "os_cache", "order"),
    [("random", True, "SEQUENTIAL"), ("random", True, "QUASI_RANDOM"), ("center", False, "QUASI_RANDOM")],
)
def test_ffcv__reads_pixels_and_labels(
    mixed: Path, jpegs: list[bytes], by_ffcv: ByFfcv, decoder: str, os_cache: bool, order: str
) -> None:
    found = by_ffcv(mixed, decoder, os_cache=os_cache, order=order)
    labels = [int(label[0]) for _, label in found]
    assert sorted(labels) == list(range(100))
    assert (labels == list(range(100))) == (order == "SEQUENTIAL")
    for pixels, label in found:
        np.testing.assert_array_equal(pixels, middle(decoded(jpegs[int(label[0])])))


def test_ffcv__several_labels_and_equal_sizes(make_jpeg: MakeJpeg, by_ffcv: ByFfcv, tmp_path: Path) -> None:
    files = [of_size(make_jpeg(45, 37, mode=("RGB", "L")[at % 2], seed=at), 90_000) for at in range(60)]
    several = [tuple(sorted({at % 7, 11 - at % 5})) if at % 9 else () for at in range(60)]
    samples = [
        sample(at, data, (labels or (-1,))[0], labels=labels)
        for at, (data, labels) in enumerate(zip(files, several, strict=True))
    ]
    with small_pages():
        written = write_beton(tmp_path / "x.beton", samples, num_classes=12)
    found = by_ffcv(tmp_path / "x.beton", "simple", os_cache=False, order="SEQUENTIAL")
    assert len(found) == 60
    for row, (pixels, marks) in enumerate(found):
        np.testing.assert_array_equal(pixels, decoded(files[row]))
        assert tuple(np.flatnonzero(marks).tolist()) == several[row]
        assert marks.max() <= 1
    listing = BetonSource(tmp_path / "x.beton").listing()
    assert [listing.labels_of(row) for row in range(60)] == several
    assert_same(read_rows(tmp_path / "x.beton"), written.rows.columns())


def test_ffcv__reader_finds_fields_and_no_labels(make_jpeg: MakeJpeg, tmp_path: Path) -> None:
    write_beton(tmp_path / "x.beton", [sample(at, make_jpeg(seed=at), -1) for at in range(3)])
    reader = Reader(str(tmp_path / "x.beton"))
    assert reader.field_names == ["image", "label"]
    assert reader.metadata["f1"].tolist() == [-1, -1, -1]
    assert (reader.num_samples, len(reader.alloc_table)) == (3, 3)


def assert_same(one: dict[str, NDArray[Any]], two: dict[str, NDArray[Any]]) -> None:
    assert set(one) == set(two)
    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name], err_msg=name)


def test_our_block__holds_the_rows_written(mixed: Path, jpegs: list[bytes], tmp_path: Path) -> None:
    samples = [sample(at, data) for at, data in enumerate(jpegs)]
    with small_pages():
        written = write_beton(tmp_path / "x.beton", samples, class_names=[str(at) for at in range(100)])
    assert (tmp_path / "x.beton").read_bytes() == mixed.read_bytes()
    assert written.xxh128 == xxhash.xxh3_128_hexdigest(mixed.read_bytes())
    assert_same(read_rows(mixed), written.rows.columns())
    assert written.rows.columns()["orientation"].tolist()[:5] == [1, 1, 1, 6, 1]
    data = mixed.read_bytes()
    columns = written.rows.columns()
    for at, (offset, size) in enumerate(zip(columns["offset"], columns["bytes"], strict=True)):
        assert data[offset : offset + size] == jpegs[at]


def test_source__of_our_own_file(mixed: Path, jpegs: list[bytes]) -> None:
    source = BetonSource(mixed)
    listing = source.listing()
    assert listing.keys[42] == "folder/0042"
    assert listing.labels.tolist() == list(range(100))
    assert listing.class_names == tuple(str(at) for at in range(100))
    assert [source.load("", place) for place in listing.places] == jpegs


def test_layout__no_sample_crosses_a_page_and_padding_is_zero(mixed: Path) -> None:
    columns = read_rows(mixed)
    assert columns["offset"][0] == HEAD_BYTES
    ends = columns["offset"] + columns["bytes"]
    assert (columns["offset"] >> 21 == (ends - 1) >> 21).all()
    assert columns["offset"][-1] >> 21 == 3
    assert list(damage(mixed)) == []


def test_layout__large_image_makes_pages_larger(make_jpeg: MakeJpeg, by_ffcv: ByFfcv, tmp_path: Path) -> None:
    """Whatever was laid out for smaller pages holds for larger ones."""
    small, large = make_jpeg(SIDE, SIDE), of_size(make_jpeg(SIDE, SIDE, seed=1), PAGE_BYTES + 1)
    path = tmp_path / "x.beton"
    write_beton(path, [sample(at, large if at in (2, 3) else small) for at in range(5)])
    assert Beton(path).page_size == 2 * PAGE_BYTES
    assert read_rows(path)["offset"][3] == 2 * PAGE_BYTES
    assert list(damage(path)) == []
    found = by_ffcv(path, "simple", os_cache=False, order="SEQUENTIAL")
    assert [int(label[0]) for _, label in found] == list(range(5))
    np.testing.assert_array_equal(found[3][0], decoded(large))


def test_layout__many_rows_move_the_images(make_jpeg: MakeJpeg, tmp_path: Path) -> None:
    image, path = store(make_jpeg()), tmp_path / "x.beton"
    written = write_beton(path, (Sample(key=f"{at}", label=at % 10, image=image) for at in range(15_000)))
    assert written.rows.columns()["offset"][0] == HEAD_BYTES + PAGE_BYTES
    assert_same(read_rows(path), written.rows.columns())
    assert list(damage(path)) == []
    assert Reader(str(path)).metadata["f1"].tolist() == [at % 10 for at in range(15_000)]
    assert written.xxh128 == xxhash.xxh3_128_hexdigest(path.read_bytes())


def test_beton_shard__memory_does_not_grow_with_images(make_jpeg: MakeJpeg, tmp_path: Path) -> None:
    data = of_size(make_jpeg(), 1 << 20)
    tracemalloc.start()
    write_beton(tmp_path / "x.beton", (sample(at, bytes(bytearray(data))) for at in range(60)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20


def test_beton_shard__no_sample(tmp_path: Path) -> None:
    written = write_beton(tmp_path / "x.beton", [])
    assert_same(read_rows(tmp_path / "x.beton"), written.rows.columns())
    assert list(damage(tmp_path / "x.beton")) == []
    with pytest.raises(ShardError, match="holds no images"):
        BetonSource(tmp_path / "x.beton").listing()


def test_beton_shard__what_ffcv_cannot_hold(make_jpeg: MakeJpeg, tmp_path: Path) -> None:
    good = store(make_jpeg())
    several = Sample(key="k", label=1, labels=(1, 2), image=good)
    with pytest.raises(ShardError, match="the number of classes is not given"):
        write_beton(tmp_path / "x.beton", [several])
    with pytest.raises(ShardError, match="a label of .1, 2. is none of 2 classes"):
        write_beton(tmp_path / "x.beton", [several], num_classes=2)
    image = replace(good, width=70_000, height=1)
    with pytest.raises(ShardError, match="70000 × 1 pixels; a .beton holds up to 65535 a side"):
        write_beton(tmp_path / "x.beton", [Sample(key="k", label=1, image=image)])
    with pytest.raises(ShardError, match="k: a .beton holds JPEG, not png"):
        write_beton(tmp_path / "x.beton", [Sample(key="k", label=1, image=replace(good, extension="png"))])


def test_beton_shard__broken_off_is_no_beton(make_jpeg: MakeJpeg, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), BetonShard(tmp_path / "x.beton") as shard:
        shard.add(sample(0, make_jpeg()))
        raise RuntimeError
    with pytest.raises(ShardError):
        Beton(tmp_path / "x.beton")
