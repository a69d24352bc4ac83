"""Every method trains in the engine: on two ranks, at ZeRO 0, 1 and 3 alike, and its teachers move."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import warm_python

pytestmark = pytest.mark.long

PROGRAM = Path(__file__).parent / "methods_program.py"
METHODS = ("maskcluster", "sdae", "dino", "ibot", "mocov3", "msn")  # test_ranks.py has PL-MAE, test_maect.py MAE-CT


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("methods")
    done = warm_python.completed(warm_python.on_ranks(2, [str(PROGRAM), str(out), *METHODS]), timeout=400)
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_train_step__a_method_has_the_same_losses_at_each_stage(found: list[dict[str, Any]], method: str) -> None:
    first, *others = (found[0][f"{method} {stage}"]["losses"] for stage in (0, 1, 3))
    assert all(math.isfinite(loss) for loss in first)
    assert len(set(first)) == len(first)
    for losses in others:
        assert losses == pytest.approx(first, rel=2e-4)


@pytest.mark.parametrize("method", METHODS)
def test_train_step__teachers_move_alike_on_both_ranks(found: list[dict[str, Any]], method: str) -> None:
    for stage in (0, 1, 3):
        moved = [report[f"{method} {stage}"]["moved"] for report in found]
        assert moved[0] == moved[1]
        assert moved[0] and all(moved[0].values())
