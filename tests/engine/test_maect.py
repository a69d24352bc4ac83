"""MAE-CT under real DeepSpeed: one and two CPU ranks, killed and continued, and what it inherits from another run."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_python
from safetensors.torch import save_file

from maestri.engine.config import InitialConfig
from maestri.engine.errors import CheckpointError
from maestri.engine.initial import load_initial
from maestri.model.build import MethodConfig, build_method
from maestri.model.encoder import EncoderConfig
from maestri.model.maect_config import MaectConfig
from maestri.model.method import Method
from maestri.model.queue import NeighbourQueue

pytestmark = pytest.mark.long

PROGRAM = Path(__file__).parent / "maect_program.py"
LIFE = "tune-1-fp32-2"
ALONE = ["head-0-fp32-1", "tune-0-fp32-2"]
TOGETHER = ["head-1-fp32-1", "tune-2-fp32-2", "tune-3-bf16-1"]
# float32 sums in another order (6e-8 each), over 6 steps at a learning rate of 0.01; see test_ranks.py.
TOLERANCE = 1e-5

Report = dict[str, Any]


def launch(out: Path, world_size: int, arguments: list[str], *, expected: int = 0) -> list[Report]:
    """Runs the program in ``world_size`` processes and returns each rank's report."""
    out.mkdir(exist_ok=True)
    done = warm_python.completed(warm_python.on_ranks(world_size, [str(PROGRAM), str(out), *arguments]), timeout=400)
    assert done.returncode == expected, done.stderr
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(world_size)] if not expected else []


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return launch(tmp_path_factory.mktemp("maect") / "one", 1, ["whole", LIFE, *ALONE])[0]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    return launch(tmp_path_factory.mktemp("maect") / "two", 2, TOGETHER)


@pytest.mark.parametrize("case", [case for case in TOGETHER if "fp32" in case])
def test_train_step__two_ranks_have_the_losses_of_one(alone: Report, together: list[Report], case: str) -> None:
    stage, _, precision, accumulation = case.split("-")
    reference = alone[f"{stage}-0-{precision}-{accumulation}"]["losses"]
    for found, expected in zip(together[0][case]["losses"], reference, strict=True):
        for name in ("loss", "loss_contrastive", "neighbour_similarity"):
            assert found[name] == pytest.approx(expected[name], rel=TOLERANCE), name
    assert together[0][case]["losses"] == together[1][case]["losses"]


@pytest.mark.parametrize("case", [case for case in TOGETHER if case.startswith("tune")])
def test_teachers__are_the_float64_average_of_the_masters(together: list[Report], case: str) -> None:
    for report in together:
        assert report[case]["teachers"].keys() == {"projection_teacher", "encoder_average"}
        for role, teacher in report[case]["teachers"].items():
            assert teacher["error"] < 2e-7, role
            assert teacher["moved"] > 2e-4, role
            assert teacher["module_is_rounded_average"] and teacher["no_gradients"], role


@pytest.mark.parametrize("case", TOGETHER)
def test_resume__is_bit_equal(together: list[Report], case: str) -> None:
    for report in together:
        assert report[case]["resumed_losses_equal"]
        assert report[case]["resumed_weights_equal"]
        assert report[case]["resumed_teachers_equal"]


@pytest.mark.parametrize("case", ALONE)
def test_frozen__under_the_engine(alone: Report, case: str) -> None:
    found = alone[case]["frozen"]
    assert all(name.startswith("encoder.") for name in found["names"])
    assert "encoder.blocks.0.attn.qkv.weight" in found["names"]
    assert ("encoder.blocks.1.attn.qkv.weight" in found["names"]) == case.startswith("head")
    assert found["unmoved"] and found["without_gradient"] and found["in_eval_mode"] and found["trains"]


def test_resume__killed_run_goes_on_with_its_queue(alone: Report, tmp_path: Path) -> None:
    launch(tmp_path, 1, ["killed", LIFE], expected=-signal.SIGKILL)
    again = launch(tmp_path, 1, ["again", LIFE])[0]["life"]
    whole = alone["life"]
    assert again.pop("losses") == whole["losses"][-3:]
    assert again == {name: value for name, value in whole.items() if name != "losses"}


# ------------------------------------------------------------------------------------------------ what is inherited


def method_of(stage: str) -> Method:
    small = {"projector_hidden": 16, "projection": 8, "predictor_hidden": 16, "queue_size": 16}
    config = MethodConfig(name="maect", maect=MaectConfig(stage=stage, **small))
    encoder = EncoderConfig(patch=4, dim=16, depth=2, heads=2)
    return build_method(config, encoder, image_size=16, num_steps=1, seed=1)


def checkpoint_of(folder: Path, *prefixes: str, queue_size: int = 16) -> InitialConfig:
    """Leaves a checkpoint that holds those of the student's parts, filled with ones, and a queue of ones."""
    whole = method_of("tune").student.state_dict()
    found = {name: torch.ones_like(value) for name, value in whole.items() if name.startswith(prefixes)}
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    save_file(found, folder / "student.safetensors")
    state = NeighbourQueue(size=queue_size, dim=8).state_dict()
    save_file({f"queue.{name}": torch.ones_like(value) for name, value in state.items()}, folder / "method.safetensors")
    return InitialConfig(run=str(folder))


def test_load_initial__head_needs_an_encoder_and_tuning_the_heads_too(tmp_path: Path) -> None:
    encoder = checkpoint_of(tmp_path / "mae", "encoder.")
    method = method_of("head")
    load_initial(method, encoder)
    matrices = {name: value for name, value in method.student.state_dict().items() if value.ndim > 1}
    assert all(bool((value == 1).all()) == name.startswith("encoder.") for name, value in matrices.items())
    with pytest.raises(CheckpointError, match=r"predictor\.0\.weight"):
        load_initial(method_of("tune"), encoder)
    tuned = method_of("tune")
    told = load_initial(tuned, checkpoint_of(tmp_path / "head", ""))
    assert told.endswith(": encoder, projector, predictor, queue")
    assert (tuned.state.get_buffer("queue.entries") == 1).all()


def test_load_initial__queue_of_another_size_is_left(tmp_path: Path) -> None:
    tuned = method_of("tune")
    told = load_initial(tuned, checkpoint_of(tmp_path / "head", "", queue_size=32))
    assert told.endswith(": encoder, projector, predictor")
    assert not (tuned.state.get_buffer("queue.entries") == 1).any()


@pytest.mark.parametrize(("stage", "needs"), [("head", "encoder"), ("tune", "encoder and projector and predictor")])
def test_load_initial__says_what_is_needed(stage: str, needs: str) -> None:
    with pytest.raises(CheckpointError, match=f"initial.run is empty, .* it needs its {needs}"):
        load_initial(method_of(stage), InitialConfig())
