"""Statistics that span ranks: two ranks must give what one rank gives on the whole micro-batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parent / "ranks_program.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(rank), str(world), str(folder / f"store{world}"), str(folder / f"w{world}")],
            env=environment,
        )
        for world in (1, 2)
        for rank in range(world)
    ]
    assert [run.wait(timeout=120) for run in runs] == [0, 0, 0]
    one = torch.load(folder / "w1.0", weights_only=True)
    two = [torch.load(folder / f"w2.{rank}", weights_only=True) for rank in range(2)]
    return one, two


# Sums of 32 terms of order 1 in another order: a few float32 roundings, 6e-8 each.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize("name", ["center", "codebook", "me_max"])
def test_two_ranks__shared_state_equals_one_rank(results, name):
    one, two = results
    assert torch.equal(two[0][name], two[1][name])
    torch.testing.assert_close(two[0][name], one[name], **TOLERANCE)


@pytest.mark.parametrize("name", ["sinkhorn", "me_max_gradient", "standardised", "standardised_gradient"])
def test_two_ranks__per_sample_results_equal_one_rank(results, name):
    one, two = results
    torch.testing.assert_close(torch.cat([two[0][name], two[1][name]]), one[name], **TOLERANCE)


def test_two_ranks__codes_equal_one_rank(results):
    one, two = results
    assert torch.equal(torch.cat([two[0]["codes"], two[1]["codes"]], dim=1), one["codes"])
