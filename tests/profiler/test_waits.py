"""Calls that make the host wait for a GPU, found on a CPU."""

import torch

from maestri.profiler.waits import WaitFinder

CPU = torch.device("cpu")


def test_wait_finder__names_line_call_and_number() -> None:
    values = torch.arange(6.0, requires_grad=True)
    with WaitFinder(CPU) as found:
        for _ in range(3):
            float(values.detach().sum())
        values[values > 2].sum().backward()
        (values > 2).nonzero()
    places = {(wait.operation, wait.count) for wait in found.waits}
    assert places == {("item", 3), ("index by bool", 1), ("nonzero", 1)}
    assert found.waits[0].operation == "item"
    first = test_wait_finder__names_line_call_and_number.__code__.co_firstlineno
    assert found.waits[0].place.endswith(f"tests/profiler/test_waits.py:{first + 4}")


def test_wait_finder__does_not_name_what_waits_for_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])  # counts its steps on the host
    with WaitFinder(CPU) as found:
        (weight * 2).sum().backward()
        optimizer.step()
        torch.where(weight > 1, weight, 0.0)
    assert not found.waits


def test_wait_finder__does_not_name_what_another_device_holds() -> None:
    with WaitFinder(torch.device("cuda")) as found:
        torch.ones(()).item()
    assert not found.waits
