"""Functions whose results have the same bits on every machine: made of correctly rounded operations alone."""

import math

import numpy as np
from numpy.typing import NDArray

_LN2 = 0.6931471805599453


def exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns exp(x) for moderate x, the same bits on every machine (relative error below 1e-15)."""
    exponent = np.rint(x / _LN2)
    rest = x - exponent * _LN2
    result = np.ones_like(rest)
    for divisor in range(14, 0, -1):
        result = 1.0 + rest * result / divisor
    return np.ldexp(result, exponent.astype(np.int32))


def log(x: float) -> float:
    """Returns ln(x) for x > 0, the same bits on every machine (absolute error below 1e-14)."""
    mantissa, exponent = math.frexp(x)
    quotient = (mantissa - 1) / (mantissa + 1)
    square, series = quotient * quotient, 0.0
    for divisor in range(49, 0, -2):
        series = series * square + 1 / divisor
    return 2 * quotient * series + exponent * _LN2
