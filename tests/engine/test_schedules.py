"""Schedules as pure functions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestri.engine.schedules import cosine, scaled_lr, span_of, warmup_cosine


def test_span_of__fraction_or_steps() -> None:
    assert span_of(0.05, 1000) == 50
    assert span_of(20, 1000) == 20
    assert span_of(0, 1000) == 0


def test_scaled_lr__is_linear_in_the_batch() -> None:
    assert scaled_lr(5e-4, 256) == 5e-4
    assert scaled_lr(5e-4, 1024) == 2e-3


def test_warmup_cosine__golden() -> None:
    rates = [warmup_cosine(step, num_steps=8, warmup=2, peak=1.0, end=0.0) for step in range(9)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.9330127, 0.75, 0.5, 0.25, 0.0669873, 0.0])


@given(st.integers(1, 500), st.integers(0, 500), st.floats(1e-6, 1), st.floats(0, 1e-6))
def test_warmup_cosine__rises_then_falls_within_bounds(num_steps: int, warmup: int, peak: float, end: float) -> None:
    rates = [warmup_cosine(step, num_steps=num_steps, warmup=warmup, peak=peak, end=end) for step in range(num_steps)]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_cosine__ends() -> None:
    assert cosine(0, 10, 2.0, 1.0) == 2.0
    assert cosine(10, 10, 2.0, 1.0) == 1.0
    assert cosine(99, 10, 2.0, 1.0) == 1.0
