"""``maestri shards``."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from maestri.shards import cli

MakeFolder = Callable[[Path, dict[str, bytes]], Path]


def test_convert__prints_what_was_made(
    images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["convert", str(images), str(tmp_path / "set"), "--shard-bytes", "8KB", "--workers", "1"]) == 0
    captured = capsys.readouterr()
    assert "60" in captured.out
    assert "class" in captured.out
    assert captured.err == ""
    assert (tmp_path / "set" / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


def test_convert__json_is_all_of_the_output(
    make_folder: MakeFolder, make_jpeg: Callable[..., bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_folder(tmp_path / "source", {"a/1.jpg": make_jpeg(), "b/2.jpg": make_jpeg(), "b/3.jpg": b"bad"})
    assert cli.run(["convert", str(source), str(tmp_path / "set"), "--workers", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num_samples"], facts["num_quarantined"], facts["class_names"]) == (2, 1, ["a", "b"])


def test_convert__says_how_many_images_are_left_out(
    make_folder: MakeFolder, make_jpeg: Callable[..., bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_folder(tmp_path / "source", {"1.jpg": make_jpeg(), "2.jpg": b"bad"})
    assert cli.run(["convert", str(source), str(tmp_path / "set"), "--workers", "1"]) == 0
    expected = f"1 images could not be read: see {tmp_path / 'set' / 'quarantine.jsonl'}\n"
    assert capsys.readouterr().err == expected


def test_inspect__json(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(whole), "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["num_samples"] == sum(shard["num_samples"] for shard in facts["shards"]) == 60
    assert captured.err == ""


def test_inspect__table(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(whole)]) == 0
    assert "60" in capsys.readouterr().out


def test_verify__whole_and_damaged(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["verify", str(whole)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{whole}: 60 images are whole\n"
    assert captured.err == ""
    damaged = Path(shutil.copytree(whole, tmp_path / "set"))
    with (damaged / "shard-00001.tar").open("r+b") as file:
        file.seek(1600)  # in the first sample, or the padding behind it
        file.write(b"damage")
    assert cli.run(["verify", str(damaged)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "shard-00001.tar" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "{tmp}/nowhere", "{tmp}/set"], "there is no {tmp}/nowhere"),
        (["convert", "{tmp}/empty", "{tmp}/set"], "no images in {tmp}/empty"),
        (["convert", "{images}", "{whole}"], "another source or with other settings"),
        (["convert", "{images}", "{tmp}"], "not empty"),
        (["convert", "{images}", "{tmp}/set", "--workers", "0"], "--workers is 0"),
        (["convert", "{images}", "/proc/set"], "/proc/set"),
        (["convert", "{images}", "{images}/set"], "inside the source"),
        (["inspect", "{tmp}/nowhere"], "there is no folder {tmp}/nowhere"),
        (["inspect", "{images}"], "not a set of shards"),
        (["verify", "{images}"], "not a set of shards"),
    ],
)
def test_run__bad_input_is_one_line(
    images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    paths = {"tmp": tmp_path, "images": images, "whole": whole}
    assert cli.run([argument.format(**paths) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("maestri shards: ")
    assert message.format(**paths) in captured.err
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    "arguments",
    [[], ["convret"], ["convert"], ["convert", "a", "b", "--wrkers", "1"], ["convert", "a", "b", "--workers", "two"]],
)
def test_run__wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err != ""


def test_run__help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["convert", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("SOURCE", "OUT", "--workers", "--shard-bytes", "--json"))
