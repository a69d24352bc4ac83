"""How much of the machine a running job uses: FLOPs against the measured peak, and memory."""

import logging
from dataclasses import replace

import torch
import torch.distributed as dist

from maestri.engine.config import RunConfig
from maestri.engine.distributed import Ranks
from maestri.engine.start import COMPUTE_DTYPES
from maestri.profiler.memory import resident_bytes
from maestri.profiler.peak import product_rate
from maestri.profiler.plan_step import method_on_meta, step_flops

IMAGES = 2
"""Of the step whose FLOPs are counted, for its shapes alone."""


def flops_per_image(config: RunConfig) -> float:
    """Returns what a step computes for an image, forward and backward, all teachers among it; before ranks are joined.

    Blocks that run again in the backward pass count once: it is the model's work, not the machine's.  0 for a step that
    cannot be run for its shapes alone, because it asks for values, and for a method that cannot be built, which is told
    where it is.
    """
    once = replace(config, engine=replace(config.engine, activation_checkpointing=False))
    logging.disable()  # a method that is built twice should not warn twice
    try:
        found = step_flops(once, method_on_meta(once), images=IMAGES, world_size=1)
    except (RuntimeError, ValueError):
        return 0.0
    finally:
        logging.disable(logging.NOTSET)
    return sum(found.values()) / IMAGES


class Utilisation:
    """What of the machine's rate and memory a run uses, for a row of its log."""

    def __init__(self, config: RunConfig, ranks: Ranks, flops: float) -> None:
        """Measures the peak; every rank at once, since ranks of one machine share it.

        Args:
            config: the run's.
            ranks: this process's place.
            flops: of an image; 0 where that is not known.
        """
        self._ranks = ranks
        self._flops = flops / ranks.world_size
        self._peak = product_rate(ranks.device, COMPUTE_DTYPES[config.engine.precision], repeats=3, long_enough=0.01)
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(ranks.device)  # of the probe, and of stages before

    def row(self, images_per_second: float) -> dict[str, float]:
        """Returns ``utilisation`` (0–1, of this rank's peak; if known), ``host_bytes`` and on a GPU ``device_bytes``.

        Bytes are of the rank that has most: what its process has now, and what torch has allocated at most so far.
        Every rank calls it.
        """
        device = self._ranks.device
        names = ["host_bytes"] + ["device_bytes"] * (device.type == "cuda")
        values = [resident_bytes()] + [torch.cuda.max_memory_allocated(device)] * (device.type == "cuda")
        most = torch.tensor(values, dtype=torch.float64, device=device)
        if self._ranks.world_size > 1:
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        utilisation = {"utilisation": images_per_second * self._flops / self._peak} if self._flops else {}
        return utilisation | dict(zip(names, most.tolist(), strict=True))
