"""WebDataset tars that webdataset, GNU tar and others made."""

import gc
import io
import json
import logging
import pickle
import subprocess
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import webdataset

from maestri.shards.errors import ShardError
from maestri.shards.images import BadImage
from maestri.shards.listing import Listing
from maestri.shards.sources.tar_archives import TarImages, archives_of, open_tars
from maestri.shards.sources.webdataset_tars import WebDatasetSource

Jpeg = Callable[..., bytes]


def write_members(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """Writes a tar, member by member."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def open_webdataset(path: Path, **options: Any) -> WebDatasetSource:
    source = open_tars(path, **options)
    assert isinstance(source, WebDatasetSource)
    return source


def images_of(source: TarImages, listing: Listing) -> list[bytes]:
    """Returns all images as a worker would read them."""
    there = pickle.loads(pickle.dumps(source))
    return [there.load(listing.names[at], listing.places[at]) for at in range(len(listing))]


def labelled(path: Path, labels: list[bytes], extension: str = "cls") -> Path:
    """Writes a sample for each label."""
    return write_members(
        path, [m for at, label in enumerate(labels) for m in ((f"{at}.jpg", b"i%d" % at), (f"{at}.{extension}", label))]
    )


def test_listing__as_webdataset_reads_its_own(tmp_path: Path, make_jpeg: Jpeg) -> None:
    with webdataset.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=7, verbose=0) as sink:
        for at in range(20):
            sink.write({"__key__": f"dir/{at:04d}", "jpg": make_jpeg(seed=at), "cls": at % 3})
    source = open_webdataset(tmp_path)
    listing = source.listing()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves shards to the garbage collector
        theirs = webdataset.WebDataset([str(tar) for tar in sorted(tmp_path.glob("*.tar"))], shardshuffle=False)
        expected = [(sample["__key__"], sample["jpg"], int(sample["cls"])) for sample in theirs]
        del theirs
        gc.collect()
    keys = [unquote(key, errors="surrogateescape") for key in listing.keys]
    assert list(zip(keys, images_of(source, listing), listing.labels.tolist(), strict=True)) == expected
    assert listing.class_names == ("0", "1", "2") and listing.label_ends is None
    assert listing.names[0] == "train-000000.tar:dir/0000.jpg"
    assert listing.sizes.tolist() == [len(image) for _, image, _ in expected]
    assert source.files == tuple(sorted(tmp_path.glob("*.tar")))


@pytest.mark.parametrize("path", ["t-{000..002}.tar", "t-*.tar", "t-{000,001,002}.tar", "t-00[0-2].tar", ""])
def test_listing__one_path_for_many_tars(tmp_path: Path, path: str) -> None:
    for number in range(3):
        write_members(tmp_path / f"t-{number:03d}.tar", [(f"{number}.jpg", b"i"), (f"{number}.cls", b"%d" % number)])
    listing = open_webdataset(tmp_path / path).listing()
    assert list(listing.keys) == ["0", "1", "2"] and listing.places[:, 0].tolist() == [0, 1, 2]


def test_listing__is_the_same_twice(tmp_path: Path) -> None:
    path = labelled(tmp_path / "x.tar", [b"1", b"0"])
    assert open_webdataset(path).listing().digest() == open_webdataset(path).listing().digest()


def test_listing__keys_and_extensions_are_webdatasets(tmp_path: Path) -> None:
    members = [
        ("a.b/c.d.JPG", b"image"), ("a.b/c.cls", b"3"), ("__meta__/x.jpg", b""), ("__index__", b""),
        ("README", b""), ("./e.jpeg", b"second"), ("e.CLS", b"4"), ("f/._f.jpg", b""),
    ]  # fmt: skip
    path = write_members(tmp_path / "x.tar", members)
    source = open_webdataset(path)
    listing = source.listing()
    assert [unquote(key, errors="surrogateescape") for key in listing.keys] == ["a.b/c", "e"]
    assert listing.labels.tolist() == [3, 4] and images_of(source, listing) == [b"image", b"second"]


def test_listing__members_in_any_order_but_together(tmp_path: Path) -> None:
    path = write_members(
        tmp_path / "x.tar", [("b.cls", b"1"), ("b.png", b"i"), ("a.txt", b""), ("a.jpg", b""), ("a.cls", b"0")]
    )
    assert list(open_webdataset(path).listing().keys) == ["b", "a"]
    path = write_members(tmp_path / "y.tar", [("b.png", b""), ("b.txt", b""), ("a.jpg", b""), ("b.cls", b"1")])
    with pytest.raises(ShardError, match=r"members of sample b are apart.*byte 2048.*--sort=name"):
        open_webdataset(path).listing()


def test_listing__hint_for_samples_that_are_apart_works(tmp_path: Path) -> None:
    for name in ("b.png", "b.cls", "a.jpg", "a.cls"):
        (tmp_path / name).write_bytes(b"1")
    subprocess.run(["tar", "-C", tmp_path, "-cf", tmp_path / "x.tar", "b.png", "a.jpg", "a.cls", "b.cls"], check=True)
    with pytest.raises(ShardError, match="apart"):
        open_webdataset(tmp_path / "x.tar").listing()
    (tmp_path / "x.tar").unlink()
    subprocess.run(f"cd {tmp_path} && tar --sort=name -cf ../y.tar . && mv ../y.tar .", shell=True, check=True)
    assert list(open_webdataset(tmp_path / "y.tar").listing().keys) == ["a", "b"]


def test_listing__what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [
        ("a.jpg", b"i"),
        ("a.cls", b"1"),
        ("a.txt", b"x"),
        ("a.seg.png", b"x"),
        ("b.cls", b"1"),
        ("LICENSE", b""),
    ]
    members += [("c.jpg", b"i"), ("__x__", b"")]
    listing = open_webdataset(write_members(tmp_path / "x.tar", members)).listing()
    assert listing.names[0] == "x.tar:a.jpg" and listing.labels.tolist() == [1, -1]
    said = "\n".join(record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert "2 members of" in said and "1 metadata" in said and "1 without key" in said
    assert "1 txt" in said and "1 seg.png" in said and "cls" not in said.partition("beside")[2].partition("\n")[0]
    assert "1 samples" in said and "have no image" in said and "x.tar:b" in said
    assert "have no label, such as x.tar:c" in said


def test_listing__tars_that_each_count_from_zero(tmp_path: Path) -> None:
    for name in ("a", "b"):
        labelled(tmp_path / f"{name}.tar", [b"0", b"1"])
    assert list(open_webdataset(tmp_path).listing().keys) == ["a/0", "a/1", "b/0", "b/1"]


def test_listing__tars_of_one_name_in_two_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        labelled(tmp_path / name / "x.tar", [b"0"])
    listing = open_webdataset(tmp_path / "{a,b}" / "x.tar").listing()
    assert list(listing.keys) == ["a/x/0", "b/x/0"] and list(listing.names) == ["a/x.tar:0.jpg", "b/x.tar:0.jpg"]


def test_listing__several_images_need_a_choice(tmp_path: Path) -> None:
    members = [("a.left.png", b"left"), ("a.right.png", b"right"), ("a.cls", b"1")]
    path = write_members(tmp_path / "x.tar", members)
    with pytest.raises(ShardError, match="x.tar:a has 2 images: left.png, right.png; say --image left.png or"):
        open_webdataset(path).listing()
    source = open_webdataset(path, image_key="right.png")
    assert images_of(source, source.listing()) == [b"right"]


def test_listing__image_member_of_any_name(tmp_path: Path) -> None:
    path = write_members(tmp_path / "x.tar", [("a.img.jpg", b"image"), ("a.cls", b"1")])
    assert open_webdataset(path).listing().names[0] == "x.tar:a.img.jpg"
    with pytest.raises(ShardError, match="no images in"):
        open_webdataset(path, image_key="png").listing()


LABELS: dict[str, tuple[list[bytes], list[int], tuple[str, ...]]] = {
    "cls": ([b"2", b" 0\n", b"-1"], [2, 0, -1], ("0", "1", "2")),
    "names.cls": ([b"dog", b"cat", b"dog"], [1, 0, 1], ("cat", "dog")),
    "index": ([b"1", b"0"], [1, 0], ("0", "1")),
    "json": ([b'{"label": 1, "x": 2}', b'{"class": 0}', b"{}"], [1, 0, -1], ("0", "1")),
    "named.json": ([b'{"label": "dog"}', b'{"label": null, "cls": "cat"}'], [1, 0], ("cat", "dog")),
    "bare.json": ([b"1", b"0"], [1, 0], ("0", "1")),
}


@pytest.mark.parametrize("extension", LABELS)
def test_listing__labels_in_each_form(tmp_path: Path, extension: str) -> None:
    texts, numbers, names = LABELS[extension]
    member = extension.rpartition(".")[2]
    listing = open_webdataset(labelled(tmp_path / "x.tar", texts, member)).listing()
    assert listing.labels.tolist() == numbers and listing.class_names == names


def test_listing__several_labels(tmp_path: Path) -> None:
    texts = [json.dumps({"labels": labels}).encode() for labels in ([2, 0], [], [1], 3)]
    listing = open_webdataset(labelled(tmp_path / "x.tar", texts, "json")).listing()
    assert listing.labels.tolist() == [2, -1, 1, 3]
    assert [listing.labels_of(at) for at in range(4)] == [(2, 0), (), (1,), (3,)]
    texts = [b'{"labels": ["dog", "cat"]}', b'{"labels": ["cat", "eel"]}']
    listing = open_webdataset(labelled(tmp_path / "y.tar", texts, "json")).listing()
    assert listing.class_names == ("cat", "dog", "eel") and listing.labels_of(1) == (0, 2)


@pytest.mark.parametrize("key", ["kind", "json:kind", "JSON:kind"])
def test_listing__label_key_chooses(tmp_path: Path, key: str) -> None:
    path = write_members(tmp_path / "x.tar", [("a.jpg", b""), ("a.cls", b"5"), ("a.json", b'{"label": 1, "kind": 3}')])
    assert open_webdataset(path).listing().labels.tolist() == [5]
    assert open_webdataset(path, label_key=key).listing().labels.tolist() == [3]
    assert open_webdataset(path, label_key="json").listing().labels.tolist() == [1]


def test_listing__given_class_names_number_the_labels(tmp_path: Path) -> None:
    path = labelled(tmp_path / "x.tar", [b"dog"])
    listing = open_webdataset(path, class_names=("ant", "cat", "dog")).listing()
    assert listing.labels.tolist() == [2] and len(listing.class_names) == 3
    with pytest.raises(ShardError, match="'dog' is none of the 1 classes"):
        open_webdataset(path, class_names=("cat",)).listing()


BAD_LABELS = {
    "name among numbers": ("cls", [b"1", b"cat"], "some are names: 1 in x.tar:0, 'cat' in x.tar:1"),
    "out of int32": ("cls", [b"4294967296"], "x.tar:0: label 4294967296 is out of range"),
    "an id": ("cls", [b"99999999"], "out of range"),
    "negative": ("cls", [b"-2"], "label -2 is out of range"),
    "no text": ("cls", [b"\xff\xfe"], "x.tar:0.cls should hold a label and is no text"),
    "broken json": ("json", [b"{"], "x.tar:0.json is no JSON"),
    "deep json": ("json", [b"[" * 100000], "is no JSON"),
    "float": ("json", [b'{"label": 1.5}'], "not 1.5"),
    "bool": ("json", [b'{"label": true}'], "not True"),
    "object": ("json", [b'{"label": {"a": 1}}'], "not {'a': 1}"),
    "lone surrogate": ("json", [b'{"label": "\\ud800"}'], "cannot be the name of a class"),
    "many digits": ("json", [b'{"label": 1' + b"0" * 4000 + b"}"], "a number of many digits"),
    "large": ("cls", [b" " * (1 << 20) + b"1"], "should hold a label and has 1048577 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LABELS)
def test_listing__labels_that_are_none(tmp_path: Path, case: str) -> None:
    extension, texts, reason = BAD_LABELS[case]
    with pytest.raises(ShardError) as caught:
        open_webdataset(labelled(tmp_path / "x.tar", texts, extension)).listing()
    assert reason in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_listing__member_twice(tmp_path: Path) -> None:
    path = write_members(tmp_path / "x.tar", [("a.jpg", b""), ("a.cls", b"1"), ("a.JPG", b"")])
    with pytest.raises(ShardError, match="a.jpg is in it twice"):
        open_webdataset(path).listing()


@pytest.mark.parametrize("members", [[], [("a.txt", b""), ("b.cls", b"1")]])
def test_listing__without_images(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    path = write_members(tmp_path / "x.tar", members)
    with pytest.raises(ShardError, match="no images in"):
        WebDatasetSource(path, [path]).listing()


def test_listing__hostile_names_stay_below(tmp_path: Path) -> None:
    names = ["../../etc/a", "/etc/b", "c/../../d", "..", "x\ny/e", "..."]
    members = [(f"{name}.{extension}", b"1") for name in names for extension in ("jpg", "cls")]
    path = write_members(tmp_path / "x.tar", members)
    keys = list(open_webdataset(path).listing().keys)
    assert keys == ["%2E%2E/%2E%2E/etc/a", "etc/b", "c/%2E%2E/%2E%2E/d", "x%0Ay/e"]
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar"]


def test_load__tar_that_became_shorter_or_vanished(tmp_path: Path) -> None:
    path = labelled(tmp_path / "x.tar", [b"1"])
    source = open_webdataset(path)
    listing = source.listing()
    with path.open("r+b") as file:
        file.truncate(512)
    with pytest.raises(OSError, match="shorter than when it was listed") as caught:
        source.load(listing.names[0], listing.places[0])
    assert caught.value.filename == str(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"x\.tar"):
        pickle.loads(pickle.dumps(source)).load(listing.names[0], listing.places[0])


def test_load__member_too_large_for_an_image(tmp_path: Path) -> None:
    source = open_webdataset(labelled(tmp_path / "x.tar", [b"1"]))
    with pytest.raises(BadImage, match="2147483649 bytes"):
        source.load("x", np.array([0, 512, (1 << 31) + 1]))


def test_open_tars__folder_of_several_splits(tmp_path: Path) -> None:
    for name in ("x-train-0", "x-train-1", "x-validation-0"):
        labelled(tmp_path / f"{name}.tar", [b"1"])
    with pytest.raises(ShardError, match=r"several splits \(train, val\); say --split train or --split val"):
        open_tars(tmp_path)
    assert len(open_webdataset(tmp_path, split="train").files) == 2
    assert len(open_webdataset(tmp_path, split="val").files) == 1
    with pytest.raises(ShardError, match=r"no \.tar files of split 'test'; those there are train, val"):
        open_tars(tmp_path, split="test")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no.tar", "there is no"), ("no-*.tar", "no file matches"), ("x-{0..3}.tar", r"no file .*x-1\.tar, which"),
        ("x-{0..3.tar", "don't pair up"), ("x-{0..9}{0..9999999}.tar", "more than"),
        ("x-{0..%s}" % ("9" * 5000), "pair up"),
        ("x-{0..99999999999}.tar", "more than"), ("empty", r"holds no \.tar files"),
    ],
)  # fmt: skip
def test_open_tars__paths_that_lead_nowhere(tmp_path: Path, path: str, reason: str) -> None:
    (tmp_path / "empty").mkdir()
    labelled(tmp_path / "x-0.tar", [b"1"])
    with pytest.raises(ShardError, match=reason):
        open_tars(tmp_path / path)


def test_open_tars__options_that_do_not_apply(tmp_path: Path) -> None:
    path = labelled(tmp_path / "x.tar", [b"1"])
    with pytest.raises(ShardError, match="WebDataset, and --labels is not for those"):
        open_tars(path, labels=tmp_path / "labels.csv")
    with pytest.raises(ShardError, match="--split is not for those"):
        open_tars(path, split="train")


def test_archives_of__tars_and_compressed_tars(tmp_path: Path) -> None:
    path = labelled(tmp_path / "x.tar", [b"1"])
    assert archives_of(path) and archives_of(tmp_path) and archives_of(Path("x.tar.gz")) and archives_of(Path("x.tgz"))
    (tmp_path / "sub").mkdir()
    assert not archives_of(tmp_path / "sub") and not archives_of(Path("x.jpg"))
