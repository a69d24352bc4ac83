"""What the machine can do at best, measured: products of large matrices, and a stream through memory."""

import statistics
import time
from dataclasses import dataclass
from functools import partial

import torch

from maestri.profiler.clock import Clock, seconds_of

LARGEST_SIDE = 8192
"""Of the matrices multiplied."""
LONG_ENOUGH = 0.05
"""Seconds that one product should take, so that starting it does not count."""
STREAM_BYTES = 256 * 1024**2
"""Of each of a stream's two tensors: several times the last level of cache of most machines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """The machine's measured limits, of this process."""

    flops_per_second: float
    """Of a product of two square matrices in the compute dtype; median."""
    bytes_per_second: float
    """Read and written by ``average.lerp_(master, weight)`` in float32; median."""
    stream_bytes: int
    """Read and written by one such stream."""


def measure_peak(
    device: torch.device,
    dtype: torch.dtype,
    *,
    repeats: int = 9,
    stream_bytes: int = STREAM_BYTES,
    clock: Clock = time.perf_counter,
) -> Peak:
    """Returns the limits of a device.

    Args:
        device: what is measured.
        dtype: of the matrices: the compute dtype.
        repeats: of each measurement, whose median counts.
        stream_bytes: of each of a stream's two tensors.
        clock: read on a CPU.
    """
    stream = Stream(stream_bytes, device)
    streams = seconds_of(stream, device=device, repeats=repeats, clock=clock)
    return Peak(
        flops_per_second=product_rate(device, dtype, repeats=repeats, clock=clock),
        bytes_per_second=stream.num_bytes / statistics.median(streams),
        stream_bytes=stream.num_bytes,
    )


def product_rate(
    device: torch.device,
    dtype: torch.dtype,
    *,
    repeats: int,
    long_enough: float = LONG_ENOUGH,
    clock: Clock = time.perf_counter,
) -> float:
    """Returns FLOPs per second of the product of two square matrices, large enough to take ``long_enough`` seconds."""
    side = _long_enough_side(device, dtype, long_enough)
    # Of their own: how many are drawn depends on the machine, and training must not.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    products = seconds_of(lambda: torch.mm(left, right, out=out), device=device, repeats=repeats, clock=clock)
    return 2 * side**3 / statistics.median(products)


class Stream:
    """One pass over memory: two float32 tensors are read, one of them is written."""

    def __init__(self, tensor_bytes: int, device: torch.device) -> None:
        self._average = torch.zeros(tensor_bytes // 4, device=device)
        self._master = torch.ones_like(self._average)
        self.num_bytes = 3 * self._average.nbytes
        """Read and written."""

    def __call__(self) -> None:
        """Makes the pass."""
        self._average.lerp_(self._master, 1e-3)


def _long_enough_side(device: torch.device, dtype: torch.dtype, seconds: float) -> int:
    """Returns the smallest power of two from 512 on whose product takes long enough."""
    side = 512
    while side < LARGEST_SIDE:
        matrix = torch.ones(side, side, device=device, dtype=dtype)
        product = partial(torch.mm, matrix, matrix)
        if min(seconds_of(product, device=device, repeats=2)) >= seconds:
            return side
        side *= 2
    return side
