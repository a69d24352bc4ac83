"""What teachers cost: the same student with none, one and two of them, in turns on a batch that stays."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from maestri.engine.config import RunConfig
from maestri.engine.distributed import Ranks, wait_for_all
from maestri.engine.spans import recording
from maestri.engine.start import COMPUTE_DTYPES
from maestri.pipelines.order import slice_of
from maestri.profiler.clock import Clock, Laps
from maestri.profiler.memory import peak_resident_bytes
from maestri.profiler.peak import measure_peak
from maestri.profiler.resident import resident_batch
from maestri.profiler.teachers_cost import TeachersCost, VariantCost
from maestri.profiler.variants import VARIANTS, Variant

FEWEST_ROUNDS = 3
"""A median of fewer says nothing."""
WARM_UP = 2
"""Steps of each variant that do not count, beside the one whose FLOPs are counted."""


def measure_teachers(
    config: RunConfig,
    ranks: Ranks,
    *,
    steps: int,
    rounds: int,
    clock: Clock = time.perf_counter,
    on_step: Callable[[], None] = lambda: None,
) -> TeachersCost:
    """Returns what teachers cost; every rank must call it.

    Args:
        config: of a run of PL-MAE.
        steps: of each variant in a round.
        rounds: in each of which every variant has its turn, and another one the first.
        clock: read on a CPU.
        on_step: called after each optimizer step.
    """
    peak = measure_peak(ranks.device, COMPUTE_DTYPES[config.engine.precision], clock=clock)
    share = slice_of(ranks.rank, ranks.world_size, config.batch.micro_size)
    batch = resident_batch(
        config.views,
        patch=config.encoder.patch,
        seed=config.seed,
        positions=range(share.start, share.stop),
        device=ranks.device,
    )
    with tempfile.TemporaryDirectory() as folder:
        trials = {
            name: _Trial(Variant(name, config, batch, ranks, folder=Path(folder)), ranks, clock) for name in VARIANTS
        }
        for trial in trials.values():
            trial.warm_up(on_step)
        for number in range(rounds):
            first = number % len(VARIANTS)
            for name in VARIANTS[first:] + VARIANTS[:first]:
                trials[name].run(steps, on_step)
        found = {name: trial.cost() for name, trial in trials.items()}
    return TeachersCost(
        variants=found,
        peak=peak,
        images=config.batch.global_size,
        world_size=ranks.world_size,
        device=ranks.device.type,
        precision=config.engine.precision,
        resident_bytes=peak_resident_bytes(),
    )


def num_steps(*, steps: int, rounds: int) -> int:
    """Returns how often ``measure_teachers`` calls ``on_step``."""
    return len(VARIANTS) * (WARM_UP + 1 + steps * rounds)


class _Trial:
    """A variant and what has been measured of it."""

    def __init__(self, variant: Variant, ranks: Ranks, clock: Clock) -> None:
        self._variant = variant
        self._ranks = ranks
        self._laps = Laps(ranks.device, clock=clock)
        self._seconds: list[list[float]] = []
        self._spans: list[dict[str, float]] = []
        self._flops: dict[str, int] = {}
        self._working_bytes = 0

    def warm_up(self, on_step: Callable[[], None]) -> None:
        """Makes the steps that do not count."""
        for _ in range(WARM_UP):
            self._variant.step()
            on_step()
        flops = self._variant.count_flops()
        self._flops = {part: count * self._ranks.world_size for part, count in flops.items()}
        on_step()

    def run(self, steps: int, on_step: Callable[[], None]) -> None:
        """Makes a round's steps."""
        device = self._ranks.device
        wait_for_all()
        before = 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        with recording(self._laps):
            for _ in range(steps):
                with self._laps.measure("step"):
                    self._variant.step()
                on_step()
        laps = self._laps.take_laps()
        self._seconds.append(_of_slowest(laps.pop("step"), self._ranks))
        self._spans.append({name: sum(seconds) for name, seconds in laps.items()})
        if device.type == "cuda":
            self._working_bytes = max(self._working_bytes, torch.cuda.max_memory_allocated(device) - before)

    def cost(self) -> VariantCost:
        """Returns what was measured, and frees the variant."""
        self._variant.close()
        return VariantCost(
            seconds=self._seconds,
            spans=self._spans,
            flops=self._flops,
            bytes=self._variant.bytes,
            peak_bytes=self._working_bytes + self._variant.resident_bytes if self._working_bytes else 0,
        )


def _of_slowest(seconds: list[float], ranks: Ranks) -> list[float]:
    """Returns the longest of all ranks' times of each step."""
    if ranks.world_size == 1:
        return seconds
    longest = torch.tensor(seconds, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    found: list[float] = longest.tolist()
    return found
