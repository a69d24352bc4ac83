"""``maestri shards``: what its commands print, write and return."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maestri.shards import cli

MakeFolder = Callable[[Path, dict[str, bytes]], Path]
MakeJpeg = Callable[..., bytes]
ReadAll = Callable[[Path], dict[str, bytes]]
Capture = pytest.CaptureFixture[str]


def in_json(arguments: list[str], capsys: Capture, code: int = 0) -> Any:
    assert cli.run([*arguments, "--json"]) == code
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    assert captured.err == ""
    return json.loads(captured.out)


# ----------------------------------------------------------------------------------------------------------- convert


def test_convert__prints_what_was_made(images: Path, whole: Path, tmp_path: Path, capsys: Capture) -> None:
    assert cli.run(["convert", str(images), str(tmp_path / "set"), "--shard-bytes", "8KB", "--workers", "1"]) == 0
    captured = capsys.readouterr()
    assert "60" in captured.out
    assert "class" in captured.out
    assert captured.err == ""
    assert (tmp_path / "set" / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


def test_convert__json_is_all_of_the_output(
    make_folder: MakeFolder, make_jpeg: MakeJpeg, tmp_path: Path, capsys: Capture
) -> None:
    source = make_folder(tmp_path / "source", {"a/1.jpg": make_jpeg(), "b/2.jpg": make_jpeg(), "b/3.jpg": b"bad"})
    facts = in_json(["convert", str(source), str(tmp_path / "set"), "--workers", "1"], capsys)
    assert (facts["num_samples"], facts["num_quarantined"], facts["class_names"]) == (2, 1, ["a", "b"])
    both = ["convert", str(source), str(tmp_path / "both"), "--workers", "1", "--format", "both"]
    assert {form: facts["format"] for form, facts in in_json(both, capsys).items()} == {"tar": "tar", "beton": "beton"}


def test_convert__says_how_many_images_are_left_out(
    make_folder: MakeFolder, make_jpeg: MakeJpeg, tmp_path: Path, capsys: Capture
) -> None:
    source = make_folder(tmp_path / "source", {"1.jpg": make_jpeg(), "2.jpg": b"bad"})
    assert cli.run(["convert", str(source), str(tmp_path / "set"), "--workers", "1"]) == 0
    expected = f"1 images could not be read: see {tmp_path / 'set' / 'quarantine.jsonl'}\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("train", "val", "expected"),
    [
        (["ant", "bee", "cat"], ["bee"], ["ant", "bee", "cat"]),
        (["ant", "cat"], ["ant", "bee"], ["ant", "bee", "cat"]),
        (["2", "10"], ["10", "9"], ["2", "9", "10"]),
    ],
)
def test_convert__several_splits_number_classes_alike(
    make_folder: MakeFolder, make_jpeg: MakeJpeg, tmp_path: Path, capsys: Capture,
    train: list[str], val: list[str], expected: list[str],
) -> None:  # fmt: skip
    files = {
        f"{split}/{name}/1.jpg": make_jpeg() for split, names in (("train", train), ("val", val)) for name in names
    }
    source, out = make_folder(tmp_path / "source", files), tmp_path / "sets"
    found = in_json(["convert", str(source), str(out), "--split", "train,val", "--workers", "1"], capsys)
    assert {name: facts["num_samples"] for name, facts in found.items()} == {"train": len(train), "val": len(val)}
    assert found["train"]["class_names"] == found["val"]["class_names"] == expected
    for split in ("train", "val"):
        rows = in_json(["inspect", str(out / split), "--rows", "9"], capsys)["rows"]
        assert all(row["labels"] == [row["key"].split("/")[0]] for row in rows)
    assert in_json(["inspect", str(out)], capsys) == found


def test_convert__a_part_says_what_comes_next(images: Path, whole: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "set"
    for part in ("1/2", "2/2"):
        command = ["convert", str(images), str(out), "--shard-bytes", "8KB", "--workers", "1", "--part", part]
        assert cli.run(command) == 0
        text = capsys.readouterr().out
        assert f"part {part} is done; when all 2 are: maestri shards merge {out}\n" in text
    assert in_json(["merge", str(out)], capsys)["num_samples"] == 60
    assert (out / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
    assert cli.run(["merge", str(out)]) == 0
    assert "60" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- other commands


def test_inspect__json(whole: Path, capsys: Capture) -> None:
    facts = in_json(["inspect", str(whole)], capsys)
    assert facts["num_samples"] == sum(shard["num_samples"] for shard in facts["shards"]) == 60


def test_inspect__table_and_rows(whole: Path, capsys: Capture) -> None:
    assert cli.run(["inspect", str(whole), "--rows", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("60" in line for line in lines)
    assert [line.split()[0] for line in lines[-3:]] == ["row", "0", "1"]


def test_inspect__a_folder_of_sets_is_one_table(images: Path, tmp_path: Path, capsys: Capture) -> None:
    assert cli.run(["convert", str(images), str(tmp_path / "set"), "--format", "both", "--workers", "1"]) == 0
    capsys.readouterr()
    assert cli.run(["inspect", str(tmp_path / "set")]) == 0
    out = capsys.readouterr().out
    assert out.count("folder images") == 2
    assert "beton" in out


def test_verify__whole_and_damaged(whole: Path, tmp_path: Path, capsys: Capture) -> None:
    assert cli.run(["verify", str(whole), "--workers", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{whole}: 60 images are whole\n"
    assert captured.err == ""
    damaged = Path(shutil.copytree(whole, tmp_path / "set"))
    with (damaged / "shard-00001.tar").open("r+b") as file:
        file.seek(1600)  # in the first sample, or the padding behind it
        file.write(b"damage")
    assert cli.run(["verify", str(damaged), "--workers", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "shard-00001.tar" in captured.err
    found = in_json(["verify", str(damaged), "--workers", "1"], capsys, code=1)
    assert not found["is_whole"]
    assert all(line["file"].startswith(str(damaged / "shard-00001")) for line in found["damage"])


def test_verify__repair(whole: Path, tmp_path: Path, capsys: Capture, read_all: ReadAll) -> None:
    damaged = Path(shutil.copytree(whole, tmp_path / "set"))
    (damaged / "index.bin").unlink()
    (damaged / "shard-00000.idx").unlink()
    assert cli.run(["verify", str(damaged)]) == 1
    capsys.readouterr()
    assert cli.run(["verify", str(damaged), "--repair", "--workers", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{damaged}: 60 images in {len(list(whole.glob('*.tar')))} shards, the index as it was\n"
    assert captured.err == ""
    assert read_all(damaged) == read_all(whole)
    assert in_json(["verify", str(damaged), "--repair"], capsys)["is_identical"] is True


def test_index_and_repack(whole: Path, tmp_path: Path, capsys: Capture) -> None:
    facts = in_json(["index", str(whole / "*.tar"), str(tmp_path / "set"), "--workers", "1"], capsys)
    assert (facts["num_samples"], facts["source"]["kind"], facts["seed"]) == (60, "adopted", -1)
    assert cli.run(["index", str(whole / "*.tar"), str(tmp_path / "other"), "--check", "header"]) == 0
    assert "shards lie in" in capsys.readouterr().out
    arguments = ["repack", str(tmp_path / "set"), str(tmp_path / "beton"), "--format", "beton", "--workers", "1"]
    assert in_json(arguments, capsys)["num_samples"] == 60
    assert cli.run(["verify", str(tmp_path / "beton")]) == 0
    assert cli.run(["repack", str(tmp_path / "set"), str(tmp_path / "tar"), "--shard-samples", "25"]) == 0
    assert "3 tar" in capsys.readouterr().out


def test_stats(whole: Path, capsys: Capture) -> None:
    found = in_json(["stats", str(whole), "--pixels", "10"], capsys)
    assert (found["images"], found["classes"]["number"], found["pixels"]["images"]) == (60, 3, 10)
    assert cli.run(["stats", str(whole), "--pixels", "10"]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("3 classes: 20 to 20 images", "megapixels", "duplicates: 0", "channels of 10"))


def test_sample(whole: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "sheet.png"
    arguments = ["sample", str(whole), str(out), "--count", "5", "--class", "class 2"]
    rows = in_json(arguments, capsys)
    assert [row["labels"] for row in rows] == [["class 2"]] * 5
    with Image.open(io.BytesIO(out.read_bytes())) as picture:
        size = picture.size
    assert cli.run(arguments) == 0
    assert capsys.readouterr().out == f"{out}: 5 images, {size[0]} × {size[1]} pixels\n"
