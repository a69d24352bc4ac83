"""``maestri profile teachers`` as a user runs it."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import warm_python

from maestri.profiler import cli
from maestri.profiler.peak import Peak
from maestri.profiler.teachers_cost import TeachersCost, VariantCost

RECIPE = """
data: {shards: nowhere}
views: {size: 16, count: 2, mask: {ratio: 0.75}}
encoder: {patch: 4, dim: 32, depth: 2, heads: 2}
method:
  name: plmae
  plmae:
    decoder: {dim: 16, depth: 1, heads: 2}
    class_level: {head: {hidden: 24, layers: 2, bottleneck: 12, prototypes: 16}}
    data_level: {head: {hidden: 24, layers: 2, bottleneck: 12, prototypes: 16}}
    reconstruction: {codes: 16}
batch: {global_size: 8}
engine: {device: cpu, precision: fp32, zero_stage: 1}
"""
ENVIRONMENT = os.environ | {"COLUMNS": "80", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def profile(recipe: Path, *words: str, ranks: int = 1) -> "subprocess.CompletedProcess[str]":
    command = ["-m", "maestri.profiler.cli", "teachers", str(recipe), *words]
    return warm_python.completed(warm_python.on_ranks(ranks, command, env=ENVIRONMENT), timeout=300)


def test_teachers__none_one_and_two(recipe: Path, tmp_path: Path) -> None:
    done = profile(recipe, "--steps", "2", "--rounds", "3", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80 and "…" not in done.stdout
    assert "The second teacher takes" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    none, one, two = (found["variants"][name] for name in ("none", "one", "two"))
    assert all([len(steps) for steps in cost["seconds"]] == [2, 2, 2] for cost in (none, one, two))

    # The student does the same work whoever its teachers are.
    for part in ("encoder", "encoder backward", "decoder", "decoder backward", "heads", "heads backward"):
        assert none["flops"][part] == one["flops"][part] == two["flops"][part] > 0
    assert one["flops"]["teacher"] == two["flops"]["labelling_teacher"]
    extra = two["total_flops"] - one["total_flops"]
    assert extra == two["flops"]["reconstruction_teacher"] > 0
    assert found["second_teacher"]["shares"]["flops"] == pytest.approx(extra / two["total_flops"])
    assert none["teachers_flops"] == 0 and one["total_flops"] - none["total_flops"] == one["teachers_flops"]

    # Four bytes a parameter, followed or not; in fp32 the student's own copy and AdamW's three.
    assert none["bytes"]["parameters"] == one["bytes"]["parameters"] == two["bytes"]["parameters"]
    assert not any("teacher" in owner for owner in none["bytes"])
    assert two["bytes"]["module of labelling_teacher"] > two["bytes"]["module of reconstruction_teacher"] > 0
    assert none["averages_ms"] < two["averages_ms"]


def test_teachers__two_ranks_with_a_flag_of_the_recipe(recipe: Path, tmp_path: Path) -> None:
    words = ("--steps", "1", "--rounds", "3", "--batch-size", "4", "--encoder.depth", "1")
    done = profile(recipe, *words, "--json", str(tmp_path / "found.json"), ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The second teacher takes") == 1, "rank 0 alone prints"
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["images"] == 4 and found["world_size"] == 2


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--rounds", "1"], "--rounds is 1; it must be at least 3"),
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--batch-size", "-2"], "--batch-size is -2; it must be at least 1 image"),
        (["--json", "no/folder/found.json"], "--json: there is no folder no/folder"),
        (["--method.name", "mae"], "method.name is mae; teachers are counted of plmae"),
        (["--method.plmae.reconstruction.weight", "0"], "a second teacher needs reconstruction.weight"),
        (["--encodr.dim", "3"], "unknown flag '--encodr.dim'; did you mean '--encoder.dim'?"),
        (["--encoder.dim", "wide"], "encoder.dim"),
        (["--batch-size", "3", "--batch.accumulation", "2"], "batch.global_size"),
    ],
)
def test_teachers__mistakes_end_with_one_line(
    recipe: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["teachers", str(recipe), *words]) == 2
    said = capsys.readouterr().err
    assert line in said and said.startswith("maestri profile teachers: ") and said.count("\n") == 1


def test_profile__unknown_command_and_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["teacher"]) == 2
    told = capsys.readouterr().err
    assert told == "maestri profile: 'teacher' is neither a recipe (.yaml) nor one of: teachers, diff\n"
    assert cli.run([]) == 2 and "usage" in capsys.readouterr().err
    assert cli.run(["--help"]) == 0 and "teachers" in capsys.readouterr().out
    assert cli.run(["teachers", str(tmp_path / "none.yaml")]) == 2
    assert "there is no configuration" in capsys.readouterr().err


def cost(seconds: list[float], averages: float, flops: dict[str, int]) -> VariantCost:
    """Returns a variant of three rounds of two equally long steps."""
    return VariantCost(
        seconds=[[value, value] for value in seconds],
        spans=[{"averages": 2 * averages}] * 3,
        flops=flops,
        bytes={},
        peak_bytes=0,
    )


def test_teachers_cost__shares_by_hand() -> None:
    variants: dict[str, Any] = {
        "none": cost([0.5, 0.5, 0.5], 0.0, {"encoder": 60}),
        "one": cost([0.7, 0.8, 1.6], 0.01, {"encoder": 60, "teacher": 20}),
        "two": cost([1.0, 1.0, 2.0], 0.02, {"encoder": 60, "labelling_teacher": 20, "reconstruction_teacher": 20}),
    }
    peak = Peak(flops_per_second=1e12, bytes_per_second=1e10, stream_bytes=1)
    found = TeachersCost(
        variants=variants, peak=peak, images=8, world_size=1, device="cpu", precision="fp32", resident_bytes=1
    )
    assert found.time_shares == pytest.approx([0.3, 0.2, 0.2])
    assert found.time_share == pytest.approx(0.2) and found.flop_share == pytest.approx(0.2)
    assert found.ratio == pytest.approx(1.0) and found.ratio_quartiles == pytest.approx((1.0, 1.5))
    assert variants["two"].step_seconds == 1.0 and variants["two"].p95_seconds == 2.0
    assert variants["two"].teachers_flops == 40 and variants["none"].teachers_flops == 0
    assert variants["two"].averages_seconds == pytest.approx(0.02)
    assert variants["two"].averages_share == pytest.approx(0.02)
    said = found.verdict()
    assert "1.00 × its share (quartiles of rounds 1.00 and 1.50), within the aim of 1.1 ×" in said
    assert "2.00% of a step, within" in said
