"""``maestri shards``: mistakes are one line that says what to do."""

import shutil
from pathlib import Path

import pytest

from maestri.shards import cli

Capture = pytest.CaptureFixture[str]


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
        (["convert", "{images}", "{tmp}/set", "--split", "a,"], "--split is 'a,'"),
        (["convert", "{images}", "{tmp}/set", "--split", "a,../b"], "--split is 'a,../b'"),
        (["convert", "{images}", "{tmp}/set", "--split", "train,val"], "neither a folder nor an idx3 file"),
        (["inspect", "{tmp}/nowhere"], "there is no folder {tmp}/nowhere"),
        (["inspect", "{images}"], "not a set of shards"),
        (["inspect", "{whole}", "--rows", "-1"], "--rows is -1"),
        (["verify", "{images}", "--repair"], "neither a manifest nor shards"),
        (["verify", "{whole}", "--drop-damaged"], "is for --repair"),
        (["verify", "{whole}", "--workers", "0"], "--workers is 0"),
        (["index", "{tmp}/empty"], "holds no .tar"),
        (["index", "{whole}"], "holds a set of shards"),
        (["index", "{whole}/*.tar", "/proc/set"], "/proc/set"),
        (["merge", "{tmp}/empty"], "no finished part"),
        (["merge", "{tmp}/set", "{whole}"], "is a whole set"),
        (["repack", "{images}", "{tmp}/set"], "not a set of shards"),
        (["repack", "{whole}", "{whole}/set"], "inside the source"),
        (["stats", "{images}"], "not a set of shards"),
        (["stats", "{whole}", "--pixels", "-3"], "--pixels is -3"),
        (["sample", "{whole}", "{tmp}/x.png", "--class", "owl"], "there is no class 'owl'"),
        (["sample", "{whole}", "{tmp}/x.png", "--count", "0"], "--count is 0"),
        (["sample", "{whole}", "{tmp}/x.nothing"], "x.nothing cannot be written"),
        (["sample", "{whole}", "{tmp}/nowhere/x.png"], "{tmp}/nowhere/x.png"),
    ],
)
def test_run__bad_input_is_one_line(
    images: Path, whole: Path, tmp_path: Path, capsys: Capture, arguments: list[str], message: str
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


@pytest.mark.parametrize("command", ["inspect", "stats", "repack"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("a missing shard", "shards, the first is shard-00002.tar"),
        ("another version", "format version 7"),
        ("no index", "cannot be opened"),
    ],
)
def test_run__damaged_sets(
    whole: Path, tmp_path: Path, capsys: Capture, command: str, damage: str, message: str
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "damaged"))
    if damage == "a missing shard":
        (folder / "shard-00002.tar").unlink()
    elif damage == "another version":
        text = (folder / "manifest.json").read_text().replace('"format_version": 2', '"format_version": 7')
        (folder / "manifest.json").write_text(text)
    else:
        (folder / "index.bin").unlink()
    more = [str(tmp_path / "set")] if command == "repack" else []
    assert cli.run([command, str(folder), *more]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert cli.run(["verify", str(folder)]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected one of {convert, index, verify, merge, repack, stats, sample, inspect}; see maestri shards"),
        (["convret"], "Unrecognized options: convret; see maestri shards --help"),
        (["convert"], "SOURCE"),
        (
            ["convert", "a", "b", "--wrkers", "1"],
            "--wrkers, 1; perhaps you meant --workers; see maestri shards convert",
        ),
        (["convert", "a", "b", "--workers", "two"], "'two'; see maestri shards convert --help"),
        (["convert", "a", "b", "--format", "zip"], "zip"),
        (["verify", "a", "b"], "Unrecognized options: b; see maestri shards verify --help"),
    ],
)
def test_run__wrong_usage_is_one_line(arguments: list[str], message: str, capsys: Capture) -> None:
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("maestri shards")
    assert message in captured.err


@pytest.mark.parametrize("command", [command.__name__ for command in cli.COMMANDS])
def test_run__help_says_what_a_command_writes_and_shows_an_example(command: str, capsys: Capture) -> None:
    assert cli.run([command, "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"maestri shards {command} /" in out.split("For example:")[1]
    assert any(word in out for word in ("Interrupted", "othing is written", "Writes"))
    assert "--json" in out


def test_run__help_lists_all_commands(capsys: Capture) -> None:
    assert cli.run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"• {command.__name__} " in out for command in cli.COMMANDS)
    assert len(out.splitlines()) < 40
