"""Statistics that span ranks: two ranks must give what one rank gives on the whole micro-batch."""

from pathlib import Path

import pytest
import torch

from maestri.model.collectives import gather_over_ranks, gather_over_ranks_with_gradient

PROGRAM = Path(__file__).parent / "ranks_program.py"


@pytest.fixture(scope="module")
def results(on_one_and_two_ranks):
    return on_one_and_two_ranks(PROGRAM)


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


@pytest.mark.parametrize("method", ["maskcluster, sinkhorn", "maskcluster, centring", "ibot"])
def test_two_ranks__a_method_s_step_equals_one_rank(results, method):
    one, two = results
    names = {name for name in one if name.startswith(f"{method}: ")}
    for part in ("loss", "me_max_class", "me_max_patch", "gradient of encoder.cls_token", "patch_level.center_centre"):
        assert f"{method}: {part}" in names
    assert sum("gradient" in name for name in names) > 20
    for name in sorted(names):
        assert torch.equal(two[0][name], two[1][name]), name
        # What is small beside the largest of its tensor is the difference of larger numbers.
        noise = 1e-5 * float(one[name].abs().max())
        torch.testing.assert_close(two[0][name], one[name], rtol=1e-4, atol=noise, msg=f"{name} differs")


def test_two_ranks__codes_equal_one_rank(results):
    one, two = results
    assert torch.equal(torch.cat([two[0]["codes"], two[1]["codes"]], dim=1), one["codes"])


def test_gather_over_ranks__one_process_keeps_its_own():
    value = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    assert torch.equal(gather_over_ranks(value), value) and not gather_over_ranks(value).requires_grad
    gather_over_ranks_with_gradient(value).square().sum().backward()
    torch.testing.assert_close(value.grad, 2 * value.detach())


@pytest.mark.parametrize("name", ["gathered", "gathered_gradient"])
def test_gather_over_ranks__two_ranks_in_their_order_with_the_gradient_of_one(results, name):
    one, two = results
    found = two[0][name] if name == "gathered" else torch.cat([two[0][name], two[1][name]])
    torch.testing.assert_close(found, one[name], **TOLERANCE)
    assert name != "gathered" or torch.equal(two[0][name], two[1][name])
