"""Limits of the machine that the tests run on."""

import time

import pytest
import torch

from maestri.engine.spans import recording, span
from maestri.profiler.clock import Laps, seconds_of
from maestri.profiler.peak import Stream, measure_peak

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measure_peak__is_what_a_computer_can_do(dtype: torch.dtype) -> None:
    peak = measure_peak(CPU, dtype, repeats=3, stream_bytes=2**24)
    assert 1e8 < peak.flops_per_second < 1e15
    assert 1e8 < peak.bytes_per_second < 1e13
    assert peak.stream_bytes == 3 * 2**24


def test_stream__moves_its_average() -> None:
    stream = Stream(4000, CPU)
    stream()
    assert stream.num_bytes == 12000
    assert stream._average.min() == stream._average.max() == pytest.approx(1e-3)


def test_laps__each_block_for_itself() -> None:
    laps = Laps(CPU)
    with recording(laps):
        for seconds in (0.0, 0.02):
            with laps.measure("step"), span("part"):
                time.sleep(seconds)
    taken = laps.take_laps()
    assert taken.keys() == {"step", "part"}
    assert [len(found) for found in taken.values()] == [2, 2]
    assert taken["step"][0] < 0.02 <= taken["step"][1]
    assert not laps.take_laps()


def test_seconds_of__processor_time_does_not_count_waiting() -> None:
    waited = seconds_of(lambda: time.sleep(0.05), device=CPU, repeats=2, warm_up=0, clock=time.process_time)
    assert len(waited) == 2 and max(waited) < 0.05
