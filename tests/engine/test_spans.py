"""Spans report only while somebody records."""

import time

import torch

from maestri.engine.spans import SpanRecorder, recording, span


def test_span__adds_up_by_name_and_starts_anew() -> None:
    recorder = SpanRecorder(torch.device("cpu"))
    with span("outside"):
        pass
    with recording(recorder):
        for _ in range(2):
            with span("part"):
                time.sleep(0.01)
    taken = recorder.take()
    assert set(taken) == {"part"} and 0.02 <= taken["part"] < 1
    assert recorder.take() == {}
