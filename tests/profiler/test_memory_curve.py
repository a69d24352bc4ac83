"""Memory over a step, as torch's allocator tells."""

import torch
from torch import Tensor, nn

from maestri.engine.spans import span
from maestri.profiler.findings import Moment
from maestri.profiler.memory_curve import memory_curve, peak_by_part, thinned

CPU = torch.device("cpu")
BIG, SMALL = 4_000_000, 400_000


class Stage(nn.Module):
    """Makes a tensor of so many bytes, and keeps none."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self._num_bytes = num_bytes

    def forward(self, _: Tensor) -> Tensor:
        return torch.zeros(self._num_bytes // 4).sum()


def test_memory_curve__most_where_it_is() -> None:
    big, small = Stage(BIG), Stage(SMALL)
    start = torch.zeros(())

    def step() -> None:
        small(start)
        with span("averages"):
            big(start)
        small(start)

    found = memory_curve({"big": [big], "small": [small]}, CPU, 1000, step)
    assert found[0] == Moment(seconds=0.0, bytes=1000, part="other")
    peaks = peak_by_part(found)
    assert 1000 + SMALL <= peaks["small"] < 1000 + SMALL + 10_000
    assert 1000 + BIG <= peaks["big"] < 1000 + BIG + 10_000
    assert 1000 <= found[-1].bytes < 11_000
    assert max(found, key=lambda moment: moment.bytes).part == "big"


def test_thinned__keeps_the_most_and_the_order() -> None:
    moments = [Moment(seconds=float(number), bytes=(number * 7919) % 1000, part="x") for number in range(1000)]
    found = thinned(moments, most=50)
    assert len(found) <= 50
    assert max(moment.bytes for moment in found) == max(moment.bytes for moment in moments)
    assert [moment.seconds for moment in found] == sorted(moment.seconds for moment in found)
    assert thinned(moments[:10], most=50) == moments[:10]
