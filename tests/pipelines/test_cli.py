"""``maestri pipelines``."""

from pathlib import Path

import pytest
from PIL import Image

from maestri.pipelines import cli

_SMALL = ["--patch", "4", "--views.size", "28", "--samples", "3"]


def test_show__writes_a_picture(
    tiny_greys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.ShardSet, "open", lambda folder: tiny_greys, raising=False)
    out = tmp_path / "views.png"
    assert cli.run(["show", "somewhere", "--out", str(out), *_SMALL]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as picture:
        assert picture.size == (4 * 86, 3 * 86)


def test_show__bad_input_is_one_line(
    tiny_greys, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.ShardSet, "open", lambda folder: tiny_greys, raising=False)
    assert cli.run(["show", "somewhere", "--views.size", "30", "--patch", "4"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "views.size is 30" in captured.err
