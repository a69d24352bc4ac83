"""What a plan predicts is what real steps have: bytes by owner, and the most at once."""

import json
from pathlib import Path
from typing import Any

import pytest
import warm_python

from maestri.engine.config_files import load_config
from maestri.profiler import plan_cli
from maestri.profiler.plan import Allowance, Forecast, make_plan

pytestmark = pytest.mark.long

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "plan_memory.py"
RECIPE = """
data: {shards: nowhere}
views: {size: 48, count: 2, mask: {ratio: 0.5}}
encoder: {patch: 8, dim: 192, depth: 2, heads: 3}
method:
  name: plmae
  plmae:
    decoder: {dim: 64, depth: 2, heads: 4}
    class_level: {head: {hidden: 80, layers: 3, bottleneck: 24, prototypes: 120}}
    data_level: {head: {hidden: 40, layers: 2, bottleneck: 16, prototypes: 72}}
    reconstruction: {codes: 56}
  mae: {decoder: {dim: 32, depth: 1, heads: 2}}
  maskcluster:
    class_level: {head: {hidden: 48, layers: 2, bottleneck: 20, prototypes: 64}}
    patch_level: {head: {hidden: 48, layers: 2, bottleneck: 20, prototypes: 96}}
  maect: {projector_hidden: 96, projection: 32, predictor_hidden: 64, queue_size: 128}
batch: {global_size: 16}
engine: {device: cpu, precision: bf16, zero_stage: 1, threads: 1}
"""
MASKCLUSTER = "--method.name maskcluster --views.mask.ratio 0 --views.corruption.coverage 0.5"
MAECT = "--method.name maect --views.mask.ratio 0"
CASES = {
    1: (
        "--method.name mae --engine.precision fp32 --engine.zero_stage 0",
        "--method.plmae.teachers one --engine.zero_stage 3",
        "--engine.precision fp32 --engine.zero_stage 2",
        "--engine.zero_stage 0 --engine.activation_checkpointing True",
        f"{MASKCLUSTER} --engine.zero_stage 0",
    ),
    2: (
        "--engine.zero_stage 3",
        "--engine.precision fp32 --engine.zero_stage 3",
        "--method.plmae.teachers one --engine.precision fp32 --engine.zero_stage 0",
        "--method.name mae --engine.precision fp32 --engine.zero_stage 1",
        "--engine.zero_stage 2 --engine.offload optimizer",
        f"{MASKCLUSTER} --views.local.count 2 --views.local.size 24 --engine.zero_stage 2",
        f"{MAECT} --engine.zero_stage 1",
    ),
}
KEPT, ACTIVATIONS, TOTAL = 0.02, 0.1, 0.1


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def pairs(recipe: Path) -> dict[str, dict[str, dict[str, int]]]:
    found: dict[str, dict[str, dict[str, int]]] = {}
    for ranks, cases in CASES.items():
        file = recipe.parent / f"{ranks}.json"
        words = [str(PROGRAM), str(recipe), *cases, "--json", str(file)]
        done = warm_python.completed(warm_python.on_ranks(ranks, words), timeout=400)
        assert done.returncode == 0, done.stderr
        found |= {f"{ranks}: {case}": pair for case, pair in json.loads(file.read_text()).items()}
    return found


@pytest.mark.parametrize("case", [f"{ranks}: {case}" for ranks, cases in CASES.items() for case in cases])
def test_plan__is_what_a_run_has(pairs: dict[str, dict[str, dict[str, int]]], case: str) -> None:
    predicted, measured = pairs[case]["predicted"], dict(pairs[case]["measured"])
    measured.pop("batch")
    assert predicted.keys() == measured.keys()
    within = {"activations": ACTIVATIONS, "peak": TOTAL}
    for owner, guess in predicted.items():
        assert guess == pytest.approx(measured[owner], rel=within.get(owner, KEPT)), owner


def plan(recipe: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    path = recipe.parent / "plan.json"
    assert plan_cli.run([str(recipe), "--json", str(path), *words]) == 0
    return json.loads(path.read_text()), capsys.readouterr().out


def test_plan__terminal_and_json(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    words = ("--gpus", "2", "--engine.device", "auto", "--memory-gib", "4")
    found, said = plan(recipe, *words, capsys=capsys)
    assert max(map(len, said.splitlines())) <= 100 and "…" not in said
    assert [stage["stage"] for stage in found["stages"]] == [0, 1, 2, 3]
    assert all(f"ZeRO {stage}" in said for stage in range(4)) and "Assumed: 1.5 GiB" in said
    assert "ZeRO 0 holds 8 images a rank" in said and found["verdict"] == said.splitlines()[-1]
    for stage in found["stages"]:
        assert stage["fits"] and stage["allowance"] > 1.5 * 2**30
    assert found["flops_per_image"]["labelling_teacher"] > 0
    assert found["flops_per_image"]["encoder backward"] > found["flops_per_image"]["encoder"]

    offloaded, said = plan(recipe, *words, "--engine.offload", "optimizer", capsys=capsys)
    assert [stage["stage"] for stage in offloaded["stages"]] == [1, 2, 3] and "on the host" in said
    for stage, before in zip(offloaded["stages"], found["stages"][1:], strict=True):
        assert not {"masters", "moments"} & stage["kept"].keys()
        assert stage["host"]["moments"] == before["kept"]["moments"] and stage["total"] < before["total"]


def test_plan__the_largest_batch_fits_and_a_larger_one_does_not(recipe: Path) -> None:
    limit = 2 << 30
    allowance = Allowance(context_bytes=1 << 28, fragmentation=0.05)
    config = load_config(recipe, ["--engine.device", "auto"])
    found = make_plan(config, world_size=2, stages=(0, 3), limit=limit, allowance=allowance)
    forecast = Forecast(config, 2)
    for stage in found.stages:
        size = stage.largest_batch
        assert forecast.stage_plan(stage.stage, size, allowance).total <= limit
        assert forecast.stage_plan(stage.stage, size + size // 40 + 2, allowance).total > limit
    assert min(stage.largest_batch for stage in found.stages) > 8
    small = make_plan(config, world_size=2, stages=(1,), limit=1 << 20, allowance=allowance)
    assert small.stages[0].largest_batch == 0 and "not even one" not in small.verdict()
    assert small.verdict().startswith("No stage asked for holds even one image")


def test_plan__attention_on_a_gpu_keeps_no_scores(recipe: Path) -> None:
    kept = {}
    for device in ("cpu", "cuda"):
        config = load_config(recipe, ["--engine.device", device])
        kept[device] = Forecast(config, 1).needs(16).activation_bytes
    # Of 2 × 16 views, 19 and 37 tokens, two blocks each of 3 and 4 heads: softmax, bfloat16; its normaliser, float32.
    scores = 32 * 2 * 2 * (3 * 19**2 + 4 * 37**2)
    normalisers = 32 * 2 * 4 * (3 * 19 + 4 * 37)
    assert kept["cpu"] - kept["cuda"] == pytest.approx(scores - normalisers, abs=256)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--gpus", "3"], "batch.global_size 16 with batch.accumulation 1"),
        (["--batch", "9", "--gpus", "2"], "batch.global_size 9"),
        (["--zero", "4"], "--zero is 4; there are the stages 0, 1, 2 and 3"),
        (["--zero", "0", "--engine.offload", "optimizer"], "engine.offload is optimizer, which needs"),
        (["--gpus", "0"], "--gpus is 0"),
        (["--memory-gib", "0"], "--memory-gib is 0"),
        (["--json", "no/folder/plan.json"], "--json: there is no folder no/folder"),
        (["--encodr.dim", "3"], "unknown flag '--encodr.dim'"),
    ],
)
def test_plan__mistakes_end_with_one_line(
    recipe: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_cli.run([str(recipe), *words]) == plan_cli.EXIT_USAGE
    said = capsys.readouterr().err
    assert line in said and said.startswith("maestri plan: ") and said.count("\n") == 1
