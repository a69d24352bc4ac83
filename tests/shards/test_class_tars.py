"""ImageNet's archives in small, and tars of class folders."""

import io
import pickle
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from maestri.shards.errors import ShardCorrupt, ShardError
from maestri.shards.listing import Listing
from maestri.shards.sources import Source
from maestri.shards.sources.class_tars import ClassTarsSource, ImageTarSource
from maestri.shards.sources.tar_archives import open_tars

Jpeg = Callable[..., bytes]
MakeFolder = Callable[[Path, dict[str, bytes]], Path]
WNIDS = ("n01440764", "n01443537", "n02105855")


def tar_of(members: dict[str, bytes]) -> bytes:
    """Returns a tar's bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def images_of(source: Source, listing: Listing) -> list[bytes | object]:
    """Returns all images as a worker would read them."""
    there: Source = pickle.loads(pickle.dumps(source))
    return [there.load(listing.names[at], listing.places[at]) for at in range(len(listing))]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.fixture
def classes(make_jpeg: Jpeg) -> dict[str, dict[str, bytes]]:
    """Images by class and name, as ImageNet calls them."""
    return {w: {f"{w}_{at}.JPEG": make_jpeg(seed=at + i) for at in (10, 2)} for i, w in enumerate(reversed(WNIDS))}


@pytest.fixture
def train(tmp_path: Path, classes: dict[str, dict[str, bytes]]) -> Path:
    """A tar of tars by GNU tar."""
    folder = tmp_path / "unpacked"
    folder.mkdir()
    for wnid, images in classes.items():
        write(folder / f"{wnid}.tar", tar_of(images))
    names = [f"{wnid}.tar" for wnid in classes]
    subprocess.run(
        ["tar", "--format=ustar", "-C", folder, "-cf", tmp_path / "ILSVRC2012_img_train.tar", *names], check=True
    )
    return tmp_path / "ILSVRC2012_img_train.tar"


def check_train(source: Source, classes: dict[str, dict[str, bytes]]) -> Listing:
    listing = source.listing()
    assert listing.class_names == WNIDS and listing.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert list(listing.keys)[:2] == ["n01440764/n01440764_10", "n01440764/n01440764_2"]
    expected = [classes[wnid][f"{wnid}_{at}.JPEG"] for wnid in WNIDS for at in (10, 2)]
    assert images_of(source, listing) == expected
    return listing


def test_class_tars__images_within_a_tar_of_tars(train: Path, classes: dict[str, dict[str, bytes]]) -> None:
    source = open_tars(train)
    assert isinstance(source, ClassTarsSource) and source.files == (train,)
    listing = check_train(source, classes)
    assert listing.names[0] == "ILSVRC2012_img_train.tar:n01440764.tar:n01440764_10.JPEG"
    assert len(pickle.dumps(source)) < 1000


def test_class_tars__folder_of_the_inner_tars(train: Path, classes: dict[str, dict[str, bytes]]) -> None:
    listing = check_train(open_tars(train.with_name("unpacked")), classes)
    assert listing.names[0] == "n01440764.tar:n01440764_10.JPEG"
    assert listing.digest() == open_tars(train).listing().digest()


def test_class_tars__inner_tar_cut_off(tmp_path: Path, classes: dict[str, dict[str, bytes]]) -> None:
    inner = tar_of(classes[WNIDS[0]])
    path = write(tmp_path / "x.tar", tar_of({"n01440764.tar": inner[:700], "n01443537.tar": inner}))
    with pytest.raises(ShardCorrupt, match="cut off") as caught:
        open_tars(path).listing()
    assert caught.value.path == path and caught.value.offset == 512


def test_class_tars__one_without_images_is_a_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "x.tar", tar_of({"b.tar": tar_of({"1.jpg": b"i", "x.txt": b""}), "a.tar": tar_of({})}))
    listing = open_tars(path).listing()
    assert listing.class_names == ("a", "b") and listing.labels.tolist() == [1]
    assert "1 class tars have no images, such as a" in caplog.text and "1 .txt" in caplog.text


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a/x.tar": tar_of({"1.jpg": b""}), "b/x.tar": tar_of({"1.jpg": b""})}, "both class x"),
        ({"x.tar": tar_of({})}, "no images in"), ({"x.tar": b"no tar at all" * 99}, "no tar header here"),
        ({"x.tar": tar_of({"./1.jpg": b"", "1.jpg": b""})}, "x/1.jpg is in it twice"),
    ],
)  # fmt: skip
def test_class_tars__what_is_wrong(tmp_path: Path, members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(ShardError, match=reason):
        open_tars(write(tmp_path / "outer.tar", tar_of(members))).listing()


FOLDERS: dict[str, tuple[Sequence[str], str, Sequence[str], Sequence[int]]] = {
    "class folders": (("b/1.jpg", "a/2.jpg", "a/deep/3.jpg"), "", ("a", "b"), (0, 0, 1)),
    "around everything": (("x/b/1.jpg", "x/a/2.jpg"), "", ("a", "b"), (0, 1)),
    "split": (("train/b/1.jpg", "train/a/2.jpg"), "", ("a", "b"), (0, 1)),
    "chosen split": (("x/train/b/1.jpg", "x/val/a/2.jpg"), "val", ("a",), (0,)),
    "flat": (("2.jpg", "1.jpg"), "", (), (-1, -1)),
    "flat split": (("val/2.jpg", "./val/1.jpg"), "", (), (-1, -1)),
    "dots": (("./b/1.jpg", "././a//2.png"), "", ("a", "b"), (0, 1)),
    "hidden": (("b/1.jpg", "a/2.jpg", "a/._2.jpg", "__MACOSX/b/1.jpg"), "", ("a", "b"), (0, 1)),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_image_tar__classes_are_folders(tmp_path: Path, case: str) -> None:
    names, split, classes, labels = FOLDERS[case]
    source = open_tars(write(tmp_path / "x.tar", tar_of({name: name.encode() for name in names})), split=split)
    assert isinstance(source, ImageTarSource)
    listing = source.listing()
    assert listing.class_names == tuple(classes) and listing.labels.tolist() == list(labels)
    assert all(str(image, "utf-8")[-5] in listing.keys[at] for at, image in enumerate(images_of(source, listing)))


def test_image_tar__as_a_folder_of_the_same_files(tmp_path: Path, make_jpeg: Jpeg, make_folder: MakeFolder) -> None:
    from maestri.shards.sources.image_folder import FolderSource

    images = {f"class {at % 3}/v1.{at}.jpg": make_jpeg(seed=at) for at in range(9)}
    folder = make_folder(tmp_path / "images", images)
    (folder / "class 7").mkdir()
    for number, arguments in enumerate((["-C", folder, "."], ["-C", tmp_path, "images"])):
        path = tmp_path / f"{number}.tar"
        subprocess.run(["tar", "-cf", path, *arguments], check=True)
        assert open_tars(path).listing().digest() == FolderSource(folder).listing().digest()


@pytest.mark.parametrize(
    ("names", "split", "reason"),
    [
        (("a/1.jpg", "2.jpg"), "", "images beside class folders, the first is 2.jpg"),
        (("train/a/1.jpg", "val/a/1.jpg"), "", "say --split train or --split val"),
        (("train/a/1.jpg", "val/a/1.jpg"), "test", "say --split train or --split val"),
        (("a/1.jpg", "b/1.jpg"), "val", "no folder of split 'val'"),
        (("a/1.jpg", "a//1.jpg"), "", "a/1.jpg is in it twice"),
        (("1.jpg", "2.jpg", "1.cls"), "", "not beside their images"),
        (("1.txt",), "", "no images in"), ((), "", "no images in"),
    ],
)  # fmt: skip
def test_image_tar__what_is_wrong(tmp_path: Path, names: Sequence[str], split: str, reason: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    path = write(tmp_path / "x.tar", buffer.getvalue())
    with pytest.raises(ShardError, match=reason):
        ImageTarSource(path, path, split=split).listing()


def test_image_tar__validation_images_without_labels_say_where_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "x.tar", tar_of({f"ILSVRC2012_val_{at:08d}.JPEG": b"i" for at in (1, 2)}))
    assert open_tars(path).listing().labels.tolist() == [-1, -1]
    assert "ILSVRC2012_devkit_t12.tar.gz" in caplog.text and "--labels" in caplog.text


def test_image_tar__labels_from_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", tar_of({f"ILSVRC2012_val_{at:08d}.JPEG": b"i" for at in (2, 1, 3)}))
    (tmp_path / "labels.txt").write_text(
        "".join(f"ILSVRC2012_val_{at:08d}.JPEG n0000000{4 - at}\n" for at in (1, 2, 3))
    )
    listing = open_tars(path, labels=tmp_path / "labels.txt").listing()
    assert listing.labels.tolist() == [2, 1, 0] and listing.class_names[0] == "n00000001"
    names = tuple(f"n0000000{at}" for at in range(9))
    listing = open_tars(path, labels=tmp_path / "labels.txt", class_names=names).listing()
    assert listing.labels.tolist() == [3, 2, 1] and listing.class_names == names


def test_open_tars__pairs_of_images_are_webdataset(tmp_path: Path) -> None:
    images = {f"{at}.{extension}": b"" for at in range(3) for extension in ("jpg", "seg.png")}
    assert open_tars(write(tmp_path / "x.tar", tar_of(images))).listing().names[2] == "x.tar:2.jpg"
    names = {f"a/v1.{at}.jpg": b"" for at in range(3)} | {f"b/v1.{at}.jpg": b"" for at in range(4)}
    assert open_tars(write(tmp_path / "y.tar", tar_of(names))).listing().class_names == ("a", "b")


def test_open_tars__empty_tar(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no images in"):
        open_tars(write(tmp_path / "x.tar", tar_of({}))).listing()
