"""The ``maestri`` command."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from maestri.cli import main as cli

MAESTRI = Path(sys.executable).with_name("maestri")
HEAVY = ("torch", "torchvision", "timm", "deepspeed", "nvidia", "webdataset", "omegaconf")


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs the installed command."""
    return subprocess.run([MAESTRI, *arguments], capture_output=True, text=True, timeout=120)


def test_main__help_lists_the_commands() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert result.stderr == ""
    assert all(f"  {name}" in result.stdout for name in cli.COMMANDS)


def test_main__version() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, metadata.version("maestri") + "\n")


def test_main__nothing_given_is_wrong_usage() -> None:
    result = run()
    assert (result.returncode, result.stdout) == (2, "")
    assert "usage" in result.stderr


def test_main__unknown_command_is_one_line() -> None:
    result = run("shard")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "'shard'" in result.stderr
    assert "shards" in result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["shards", "--help"], ["shards", "convert", "--help"]])
def test_main__help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = f"import sys; from maestri.cli.main import main; main({arguments}); print(*sys.modules, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert not set(HEAVY) & set(result.stderr.split())
    assert "usage" in result.stdout


def test_main__interruption_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(run=interrupted))
    assert cli.main(["shards", "verify", "somewhere"]) == 130
    assert capsys.readouterr().err == "maestri: interrupted\n"


def test_main__every_room_has_a_command_line() -> None:
    for name, _ in cli.COMMANDS.values():
        assert callable(cli.importlib.import_module(name).run)
