import pytest
import torch

from maestri.engine.errors import CheckpointError
from maestri.evals.weights import load_strictly, weights_digest


def test_weights_digest__tells_names_shapes_dtypes_and_values_apart():
    value = torch.arange(6.0)
    states = [{"a": value}, {"b": value}, {"a": value.view(2, 3)}, {"a": value.half()}, {"a": value + 1}, {}]
    assert len({weights_digest(state) for state in states}) == len(states)
    assert weights_digest({"a": value, "b": value}) == weights_digest({"b": value, "a": value.clone()})


def test_weights_digest__of_scalars_and_views():
    assert weights_digest({"a": torch.tensor(3)}) != weights_digest({"a": torch.tensor(4)})
    assert weights_digest({"a": torch.ones(3, 2).T}) == weights_digest({"a": torch.ones(2, 3)})


def test_load_strictly__names_the_first_that_differs():
    module = torch.nn.Linear(3, 2)
    with pytest.raises(
        CheckpointError, match=r"there is of another model: 2 weights differ, the first is weight: \[2, 4\]"
    ):
        load_strictly(module, {"weight": torch.zeros(2, 4)}, "there")
