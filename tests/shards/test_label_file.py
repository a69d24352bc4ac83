"""Label files as people have them, and ImageNet's as they are published."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from maestri.shards.errors import ShardError
from maestri.shards.sources.label_file import label_columns

FILES = ["a/1.jpg", "a/2.jpg", "b/3 x.jpg"]
TABLES = {
    "commas": "a/1.jpg,7\na/2.jpg,0\nb/3 x.jpg,1\n",
    "headings": "file_name,label\na/1.jpg,7\na/2.jpg,0\nb/3 x.jpg,1\n",
    "other columns": "width,Image\n",
    "one of several": "id,width,label,height\na/1.jpg,5,7,5\na/2.jpg,5,0,5\nb/3 x.jpg,5,1,5\n",
    "blanks": "./a/1.jpg 7\na/2.jpg   0\n# what follows has a blank\nb/3 x.jpg 1",
    "tabs": "a/1.jpg\t7\r\na/2.jpg\t0\r\nb/3 x.jpg\t1\r\n",
    "names alone": "1.jpg,7\n2,0\n3 x,1\n",
    "quotes": '"a/1.jpg","7"\n\n"a/2.jpg","0"\n"b/3 x.jpg","1"\n',
    "byte order mark": "\ufeffa/1.jpg,7\na/2.jpg,0\nb/3 x.jpg,1\n",
}


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


@pytest.mark.parametrize("case", sorted(TABLES.keys() - {"other columns"}))
def test_label_columns__tables(tmp_path: Path, case: str) -> None:
    found = label_columns(written(tmp_path / "labels.csv", TABLES[case]), FILES)
    assert found.labels.tolist() == [7, 0, 1] and found.label_ends is None
    assert found.class_names == tuple("01234567")


def test_label_columns__names_are_sorted(tmp_path: Path) -> None:
    found = label_columns(written(tmp_path / "x.csv", "1.jpg,dog\n2.jpg,ant\n3 x.jpg,big cat\n"), FILES)
    assert found.class_names == ("ant", "big cat", "dog") and found.labels.tolist() == [2, 0, 1]


def test_label_columns__given_classes_number_them(tmp_path: Path) -> None:
    path = written(tmp_path / "x.csv", "1.jpg,dog\n")
    assert label_columns(path, FILES, class_names=("a", "b", "dog")).labels.tolist() == [2, -1, -1]
    with pytest.raises(ShardError, match="'dog' is none of the 2 classes"):
        label_columns(path, FILES, class_names=("a", "b"))


@pytest.mark.parametrize("text", ["1.jpg,3;1\n2.jpg,\n3 x.jpg,0\n", "1.jpg,3,1\n2.jpg,,\n3 x.jpg,0,\n", "f\n"])
def test_label_columns__several(tmp_path: Path, text: str) -> None:
    if text == "f\n":
        text = "file,labels,extra\n1.jpg,3;1,x\n2.jpg,,x\n3 x.jpg,0,x\n"
    found = label_columns(written(tmp_path / "x.csv", text), FILES)
    assert found.labels.tolist() == [3, -1, 0]
    assert found.label_ends is not None and found.label_ends.tolist() == [2, 2, 3]
    assert found.label_values is not None and found.label_values.tolist() == [3, 1, 0]


def test_label_columns__what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    label_columns(written(tmp_path / "x.csv", "1.jpg,3\n9.jpg,1\n8.jpg,1\n"), FILES)
    assert "2 images are not in" in caplog.text and "such as a/2.jpg" in caplog.text
    assert "2 lines of" in caplog.text and "such as 9.jpg" in caplog.text


def test_label_columns__names_in_two_folders_need_their_folder(tmp_path: Path) -> None:
    files = ["a/1.jpg", "b/1.jpg"]
    with pytest.raises(ShardError, match="names none of the images"):
        label_columns(written(tmp_path / "x.csv", "1.jpg,3\n"), files)
    assert label_columns(written(tmp_path / "y.csv", "a/1.jpg,3\nb/1,4\n"), files).labels.tolist() == [3, 4]


WRONG = {
    "contradiction": ("1.jpg,3\n1.jpg,4\n", "line 2: '1.jpg' had other labels above"),
    "no label": ("1.jpg,3\n2.jpg\n", "line 2: no label"),
    "empty": ("", "is empty"),
    "only headings": ("file,label\n", "is empty"),
    "empty labels": ("1.jpg,\n", "holds no labels"),
    "other files": ("9.jpg,1\n", "names none of the images: it says '9.jpg', and the first image is 'a/1.jpg'"),
    "columns": ("file,x,y\n1.jpg,3,4\n", "of columns file, x, y, one should be called"),
    "open quote": ('1.jpg,"3\n', "line 1: unexpected end of data"),
    "no text": ("1.jpg\0,3\n", "is no text"),
    "numbers alone": ("3\n4\n", "holds numbers alone"),
    "large number": ("1.jpg,4294967296\n", "label 4294967296 is out of range"),
    "negative": ("1.jpg,-7\n", "label -7 is out of range"),
    "two files": ("a,1\n", "'a' is two files, a.jpg and a.png"),
}


@pytest.mark.parametrize("case", WRONG)
def test_label_columns__what_is_wrong(tmp_path: Path, case: str) -> None:
    text, reason = WRONG[case]
    files = ["a.jpg", "a.png"] if case == "two files" else FILES
    with pytest.raises(ShardError) as caught:
        label_columns(written(tmp_path / "x.csv", text), files)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_label_columns__no_file(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="cannot read the labels: No such file"):
        label_columns(tmp_path / "x.csv", FILES)


# ---------------------------------------------------------------------------------------------------------- ImageNet

IMAGES = [f"ILSVRC2012_val_{at:08d}.JPEG" for at in (1, 2, 3)]
WNIDS = {1: "n02119789", 2: "n02100735", 3: "n01440764", 4: "n00001740"}


def meta_mat(leaves: int = 3) -> bytes:
    """Returns the kit's table of classes: its numbers are not in the order of identifiers, and inner nodes follow."""
    fields = (
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    )
    synsets = np.empty((len(WNIDS), 1), [(name, object) for name in fields])
    for at, (number, wnid) in enumerate(WNIDS.items()):
        children = 0 if number <= leaves else 2
        synsets[at, 0] = (
            float(number),
            wnid,
            "a word, another",
            "a gloss",
            float(children),
            np.zeros(children),
            0.0,
            1300.0,
        )
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    return buffer.getvalue()


def devkit(parts: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in parts.items():
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


TRUTH = "ILSVRC2012_validation_ground_truth.txt"
EXPECTED = ("n01440764", "n02100735", "n02119789")


def test_label_columns__devkit(tmp_path: Path) -> None:
    path = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    path.write_bytes(devkit({"meta.mat": meta_mat(), TRUTH: b"3\n1\n2\n"}))
    found = label_columns(path, IMAGES)
    assert found.class_names == EXPECTED and found.labels.tolist() == [0, 2, 1]
    assert label_columns(path, [f"val/{name}" for name in IMAGES[1:]]).labels.tolist() == [2, 1]


@pytest.mark.parametrize("beside", ["meta.mat", "ILSVRC2012_devkit_t12.tar.gz"])
def test_label_columns__ground_truth_with_its_classes_beside_it(tmp_path: Path, beside: str) -> None:
    (tmp_path / TRUTH).write_text("3\n1\n2\n")
    with pytest.raises(ShardError, match=r"put meta\.mat or ILSVRC2012_devkit_t12\.tar\.gz beside it"):
        label_columns(tmp_path / TRUTH, IMAGES)
    kit = devkit({"meta.mat": meta_mat(), TRUTH: b"3\n1\n2\n"})
    (tmp_path / beside).write_bytes(meta_mat() if beside == "meta.mat" else kit)
    found = label_columns(tmp_path / TRUTH, IMAGES)
    assert found.class_names == EXPECTED and found.labels.tolist() == [0, 2, 1]


@pytest.mark.parametrize("kaggle", ["LOC_val_solution.csv", "x.csv"])
def test_label_columns__kaggle(tmp_path: Path, kaggle: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / kaggle
    lines = ("3,n02119789 85 1 499 272 ", "1,n01440764 1 2 3 4 n01440764 5 6 7 8 ", "2,n02100735 1 2 3 4")
    path.write_text("ImageId,PredictionString\n" + "".join(f"ILSVRC2012_val_0000000{line}\n" for line in lines))
    found = label_columns(path, IMAGES)
    assert found.class_names == EXPECTED and found.labels.tolist() == [0, 1, 2] and found.label_ends is None
    assert "3 of ImageNet's classes" in caplog.text
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench\nn01440765 x\nn02100735 y\nn02119789 z, z\n")
    assert label_columns(path, IMAGES).labels.tolist() == [0, 2, 3]


def test_label_columns__kaggle_line_without_class(tmp_path: Path) -> None:
    path = written(tmp_path / "x.csv", "ImageId,PredictionString\nILSVRC2012_val_00000001,1 2 3 4\n")
    with pytest.raises(ShardError, match="line 2: expected class and box"):
        label_columns(path, IMAGES)


KITS = {
    "no gzip inside": gzip.compress(b"text"), "cut off": devkit({"meta.mat": meta_mat(), TRUTH: b"1"})[:300],
    "no meta": devkit({TRUTH: b"1"}), "no truth": devkit({"meta.mat": meta_mat()}),
    "other meta": devkit({"meta.mat": b"x" * 200, TRUTH: b"1"}),
    "number": devkit({"meta.mat": meta_mat(), TRUTH: b"4\n"}),
    "text": devkit({"meta.mat": meta_mat(), TRUTH: b"\xff\n"}), "bomb": gzip.compress(bytes((1 << 26) + 1)),
    "inner nodes": devkit({"meta.mat": meta_mat(0), TRUTH: b"1\n"}),
}  # fmt: skip


@pytest.mark.parametrize("case", KITS)
def test_label_columns__devkit_that_is_none(tmp_path: Path, case: str) -> None:
    path = tmp_path / "kit.tar.gz"
    path.write_bytes(KITS[case])
    with pytest.raises(ShardError) as caught:
        label_columns(path, IMAGES)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
