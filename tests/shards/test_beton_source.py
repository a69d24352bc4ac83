"""Files that FFCV wrote, read by us."""

import io
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ffcv.fields import (
    BytesField,
    Field,
    FloatField,
    IntField,
    JSONField,
    NDArrayField,
    RGBImageField,
    TorchTensorField,
)
from ffcv.reader import Reader
from ffcv.writer import DatasetWriter
from numpy.typing import NDArray
from PIL import Image

from maestri.shards.beton_format import Beton, is_beton
from maestri.shards.beton_rows import damage
from maestri.shards.errors import ShardError
from maestri.shards.sources.beton import BetonSource

PIXELS = [
    np.random.default_rng(seed).integers(0, 255, (8 + seed % 5, 9 + seed % 7, 3), np.uint8).repeat(6, 0).repeat(6, 1)
    for seed in range(150)
]
"""More than the 100 that FFCV's writer gives a worker at a time."""
LABELS = [seed * 7 % 10 for seed in range(150)]


class Samples:
    """What FFCV's writer takes: something with a length and rows."""

    def __init__(self, rows: Sequence[tuple[Any, ...]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: int) -> tuple[Any, ...]:
        return self._rows[at]


def write(path: Path, fields: Mapping[str, Field], *columns: Sequence[Any]) -> Path:
    """Returns the path of a file that FFCV's own writer made, with two processes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        DatasetWriter(str(path), fields, num_workers=2).from_indexed_dataset(Samples(list(zip(*columns, strict=True))))
    return path


def load_all(path: Path, **fields: str) -> tuple[list[bytes | NDArray[np.uint8]], list[int]]:
    """Returns images and labels as a worker process would get them."""
    source = BetonSource(path, **fields)
    listing = source.listing()
    copy = pickle.loads(pickle.dumps(source))
    return [copy.load(listing.names[at], listing.places[at]) for at in range(len(listing))], listing.labels.tolist()


def stock_bytes(path: Path, field: str) -> list[bytes]:
    """Returns what FFCV's reader says are the bytes of an image field."""
    reader, data = Reader(str(path)), path.read_bytes()
    sizes = {int(row["ptr"]): int(row["size"]) for row in reader.alloc_table}
    pointers = reader.metadata[f"f{reader.field_names.index(field)}"]["data_ptr"].tolist()
    return [data[at : at + sizes[at]] for at in pointers]


@pytest.fixture(scope="module")
def many_fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields = {
        "name": JSONField(), "thumbnail": RGBImageField("raw"), "text": BytesField(), "weight": FloatField(),
        "photo": RGBImageField("jpg", jpeg_quality=95), "one_hot": NDArrayField(np.dtype("f4"), (10,)),
        "group": IntField(), "several": NDArrayField(np.dtype("u1"), (2, 5)), "class": IntField(),
    }  # fmt: skip
    marks = np.eye(10, dtype="f4")[LABELS]
    several = [np.array([[at % 2, 0, 0, 1, 0], [0, 0, 0, at % 3 == 0, 0]], "u1") for at in range(len(LABELS))]
    columns: list[Sequence[Any]] = [
        [{"row": at} for at in range(len(PIXELS))], [image[:12, :18] for image in PIXELS],
        [np.frombuffer(b"text" * (at % 3), "u1") for at in range(len(PIXELS))], [0.5] * len(PIXELS),
        PIXELS, list(marks), [3] * len(PIXELS), several, LABELS,
    ]  # fmt: skip
    return write(tmp_path_factory.mktemp("beton") / "many.beton", fields, *columns)


@pytest.mark.parametrize("mode", ["jpg", "raw", "smart", "proportion"])
def test_source__gives_the_bytes_and_labels_that_ffcv_wrote(tmp_path: Path, mode: str) -> None:
    threshold = {"smart_threshold": 9000} if mode == "smart" else {}
    fields = {"image": RGBImageField(mode, **threshold), "label": IntField()}
    path = write(tmp_path / "x.beton", fields, PIXELS, LABELS)
    images, labels = load_all(path)
    assert labels == LABELS
    assert [image if isinstance(image, bytes) else image.tobytes() for image in images] == stock_bytes(path, "image")
    is_raw = [not isinstance(image, bytes) for image in images]
    assert (any(is_raw), all(is_raw)) == {"jpg": (False, False), "raw": (True, True)}.get(mode, (True, False))
    for image, pixels in zip(images, PIXELS, strict=True):
        if isinstance(image, bytes):
            assert Image.open(io.BytesIO(image)).size == pixels.shape[1::-1]
        else:
            np.testing.assert_array_equal(image, pixels)


def test_source__classes_and_names(tmp_path: Path) -> None:
    path = write(tmp_path / "x.beton", {"image": RGBImageField("jpg"), "label": IntField()}, PIXELS, LABELS)
    listing = BetonSource(path).listing()
    assert listing.class_names == tuple("0123456789")
    assert (listing.keys[7], listing.names[7]) == ("007", "x.beton[7]")
    assert listing.digest() == BetonSource(path).listing().digest()


def test_source__finds_fields_beside_others(many_fields: Path) -> None:
    images, labels = load_all(many_fields, image_field="photo", label_field="class")
    assert labels == LABELS
    assert images == stock_bytes(many_fields, "photo")
    small, labels = load_all(many_fields, image_field="thumbnail", label_field="")
    assert labels == [-1] * len(PIXELS)
    for image, pixels in zip(small, PIXELS, strict=True):
        np.testing.assert_array_equal(image, pixels[:12, :18])


def test_source__one_hot_and_several_labels(many_fields: Path) -> None:
    one = BetonSource(many_fields, image_field="photo", label_field="one_hot").listing()
    assert one.labels.tolist() == LABELS
    assert one.label_ends is None
    several = BetonSource(many_fields, image_field="photo", label_field="several").listing()
    expected = [tuple(sorted({3} | ({0} if at % 2 else set()) | ({8} if at % 3 == 0 else set()))) for at in range(150)]
    assert [several.labels_of(at) for at in range(150)] == expected
    assert several.class_names == tuple("0123456789")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "say which field is the image.*'thumbnail' .RGBImageField., 'text' .BytesField."),
        ({"image_field": "photo"}, "say which field is the label.*'group' .IntField."),
        ({"image_field": "Photo"}, "has no fields 'Photo'; its fields are 'name' .JSONField."),
        ({"image_field": "text"}, "'text' is a BytesField, not a RGBImageField"),
        ({"image_field": "photo", "label_field": "weight"}, "'weight' is a FloatField, not a IntField"),
    ],
)
def test_source__unclear_fields_are_listed(many_fields: Path, fields: dict[str, str], message: str) -> None:
    with pytest.raises(ShardError, match=message):
        BetonSource(many_fields, **fields).listing()


def test_source__tensor_of_one_number_is_a_class(tmp_path: Path) -> None:
    import torch

    fields = {"image": RGBImageField("raw"), "label": TorchTensorField(torch.int32, (1,))}
    tensors = [torch.tensor([label], dtype=torch.int32) for label in LABELS[:20]]
    path = write(tmp_path / "x.beton", fields, PIXELS[:20], tensors)
    assert load_all(path)[1] == LABELS[:20]


def test_source__no_label_field_no_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "x.beton", {"image": RGBImageField("raw")}, PIXELS[:5])
    listing = BetonSource(path).listing()
    assert (listing.labels.tolist(), listing.class_names) == ([-1] * 5, ())


class OwnField(IntField):
    """A type that only its program knows."""


def test_source__custom_type_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.beton", {"image": RGBImageField("raw"), "own": OwnField()}, PIXELS[:5], LABELS[:5])
    with pytest.raises(ShardError, match="field 'own' is of a custom type"):
        BetonSource(path).listing()


@pytest.mark.parametrize(("value", "message"), [(-2, "row 4, field 'label' is -2"), (1 << 40, "row 4, field 'label'")])
def test_source__class_numbers_have_a_range(tmp_path: Path, value: int, message: str) -> None:
    labels = [0, 1, 2, 3, value]
    path = write(tmp_path / "x.beton", {"image": RGBImageField("raw"), "label": IntField()}, PIXELS[:5], labels)
    with pytest.raises(ShardError, match=message):
        BetonSource(path).listing()


def test_is_beton__by_content_or_name(tmp_path: Path) -> None:
    path = write(tmp_path / "x.ffcv", {"image": RGBImageField("raw")}, PIXELS[:5])
    assert is_beton(path)
    for name, content, expected in (("y.bin", b"\x02\x00", False), ("z.beton", b"", True), ("w", bytes(100), False)):
        (tmp_path / name).write_bytes(content)
        assert is_beton(tmp_path / name) is expected


def test_damage__of_a_file_of_ffcvs_says_that_it_is_none_of_ours(tmp_path: Path) -> None:
    path = write(tmp_path / "x.beton", {"image": RGBImageField("jpg"), "label": IntField()}, PIXELS, LABELS)
    assert "no block of keys" in next(damage(path))


def test_beton__reads_no_image(many_fields: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file of any size, only tables are read."""
    read: list[int] = []
    original = os.pread

    def counted(file: int, size: int, at: int) -> bytes:
        read.append(size)
        return original(file, size, at)

    monkeypatch.setattr(os, "pread", counted)
    beton = Beton(many_fields)
    assert sum(read) == beton.tables_end + beton.file_bytes - beton.alloc_table_ptr
    assert beton.list_fields().count("Field") == 9
