"""MoCo-v3 and MSN: two ranks equal one that holds all samples."""

from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "contrast_ranks_program.py"


@pytest.fixture(scope="module")
def results(on_one_and_two_ranks):
    return on_one_and_two_ranks(PROGRAM)


@pytest.mark.parametrize("name", ["mocov3", "msn"])
def test_two_ranks__have_the_loss_and_gradients_of_one(results, name):
    one, two = results[0][name], [each[name] for each in results[1]]
    assert one.keys() == two[0].keys() == two[1].keys()
    assert any(key.startswith("gradient of encoder.") for key in one)
    largest = max(float(value.abs().max()) for key, value in one.items() if key.startswith("gradient"))
    for key, expected in one.items():
        # float32: sums in another order through some layers.  What a batch norm takes off again, as a shift of its
        # input, has no gradient but such rounding: hence the scale of the largest.
        scale = largest if key.startswith("gradient") else float(expected.abs().max())
        for found in two:
            difference = float((found[key] - expected).abs().max())
            assert difference <= 3e-6 * scale, f"{key}: {difference} at a scale of {scale}"
