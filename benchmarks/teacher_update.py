"""What averaging a teacher costs beside the memory traffic it needs: ``python benchmarks/teacher_update.py``.

Also ``torchrun --standalone --nproc-per-node 2 benchmarks/teacher_update.py``.  One teacher follows a ViT; its update
(``Teachers.update``) and a lower bound take turns, and each rank is timed from a barrier to its own end; the slowest
counts.  On N ranks the bound is

- a stream, ``lerp_`` over two float32 tensors of its own, of as many bytes as must be moved: of a rank's share of the
  parameters, 1/N, the average is read and written and the master read, 12 bytes; of all parameters, on one rank, the
  compute copy is written;
- on several ranks instead of the latter: an all-gather of the compute copy, which writes it.

Beside them *flat*: what torch has kernels for, ``lerp_`` and ``copy_`` into the compute copy, on tensors that lie in
one piece, and the same all-gather; the average is read once more than it must be.  Printed as Markdown, medians.
"""

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from maestri.engine import distributed
from maestri.engine.config import BatchConfig, EngineConfig, OptimizerConfig
from maestri.engine.distributed import Ranks
from maestri.engine.start import COMPUTE_DTYPES, start_engine
from maestri.model.encoder import EncoderConfig, build_encoder
from maestri.model.method import Teacher
from maestri.profiler.clock import seconds_of
from maestri.profiler.peak import Stream

MODELS = {
    "ViT-Ti/16": EncoderConfig(dim=192, heads=3),
    "ViT-S/16": EncoderConfig(dim=384, heads=6),
    "ViT-B/16": EncoderConfig(),
}


class Followed:
    """As much of a method as averaging needs: an encoder, and a teacher that follows it."""

    inherits: tuple[str, ...] = ()

    def __init__(self, config: EncoderConfig) -> None:
        self.student = nn.ModuleDict({"encoder": build_encoder(config, image_size=224)})
        module = copy.deepcopy(self.student).requires_grad_(False)
        self.teachers = {"teacher": Teacher(module=module, follows=("encoder.",), momentum=lambda step: 0.996)}
        self.state = nn.Module()


class Bound:
    """The traffic that an update cannot do without."""

    def __init__(self, num_parameters: int, dtype: torch.dtype, ranks: Ranks) -> None:
        share = -(-num_parameters // ranks.world_size)
        self.alone = ranks.world_size == 1
        self.num_bytes = 12 * share + (share * dtype.itemsize if self.alone else 0)
        """Of the stream."""
        self._stream = Stream(self.num_bytes // 3, ranks.device)
        self._mine = torch.zeros(share, dtype=dtype, device=ranks.device)
        self._all = torch.zeros(share * ranks.world_size, dtype=dtype, device=ranks.device)

    def __call__(self) -> None:
        """Moves it."""
        self._stream()
        if not self.alone:
            dist.all_gather_into_tensor(self._all, self._mine)


class Flat:
    """An update by torch's kernels, on memory that lies in one piece."""

    def __init__(self, num_parameters: int, dtype: torch.dtype, ranks: Ranks) -> None:
        share = -(-num_parameters // ranks.world_size)
        self._average, self._master = torch.zeros(share, device=ranks.device), torch.ones(share, device=ranks.device)
        self._all = torch.zeros(share * ranks.world_size, dtype=dtype, device=ranks.device)
        self._mine = self._all[ranks.rank * share :][:share]
        self._alone = ranks.world_size == 1

    def __call__(self) -> None:
        """Makes it."""
        self._average.lerp_(self._master, 1e-3)
        self._mine.copy_(self._average)
        if not self._alone:
            dist.all_gather_into_tensor(self._all, self._mine)


def measured(works: list[Callable[[], object]], ranks: Ranks, *, repeats: int, by_processor: bool) -> list[float]:
    """Returns the median seconds of each piece of work; they take turns."""
    clock = time.process_time if by_processor else time.perf_counter
    found: list[list[float]] = [[] for _ in works]
    for turn in range(-2, repeats):
        for work, seconds in zip(works, found, strict=True):
            distributed.wait_for_all()
            slowest = torch.tensor(seconds_of(work, device=ranks.device, repeats=1, warm_up=0, clock=clock))
            if ranks.world_size > 1:
                slowest = slowest.to(ranks.device)
                dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if turn >= 0:
                seconds.append(slowest.item())
    return [statistics.median(seconds) for seconds in found]


def run_case(name: str, stage: int, precision: str, ranks: Ranks, *, repeats: int, by_processor: bool) -> str:
    """Returns a row of the table."""
    method: Any = Followed(MODELS[name])
    settings: Any = {"zero_stage": stage, "precision": precision}
    engine, teachers, groups = start_engine(
        method,
        ranks,
        batch=BatchConfig(global_size=2 * ranks.world_size),
        optimizer=OptimizerConfig(),
        engine=EngineConfig(**settings),
    )
    sizes = {key: parameter.numel() for key, parameter in method.teachers["teacher"].module.named_parameters()}
    num_parameters = sum(sizes[key] for group in groups for key in group.names)
    bound = Bound(num_parameters, COMPUTE_DTYPES[precision], ranks)
    flat = Flat(num_parameters, COMPUTE_DTYPES[precision], ranks)
    works: list[Callable[[], object]] = [lambda: teachers.update(0), bound, flat]
    update, least, by_kernels = measured(works, ranks, repeats=repeats, by_processor=by_processor)
    engine.destroy()
    figures = f"{1e3 * update:.2f} | {1e3 * least:.2f} | {update / least:.2f} | {1e3 * by_kernels:.2f}"
    speed = bound.num_bytes / least / 1e9
    case = f"{name} | {num_parameters / 1e6:.1f} | {ranks.world_size} | {stage} | {precision}"
    return f"| {case} | {figures} | {speed:.1f} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=30, help="of each, after 2 that do not count")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["ViT-S/16", "ViT-B/16"])
    parser.add_argument("--stages", nargs="+", type=int, choices=range(4), default=[0, 1, 2, 3], help="of ZeRO")
    parser.add_argument("--precisions", nargs="+", choices=COMPUTE_DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--processor-time", action="store_true", help="for one rank on a CPU that others use, too")
    arguments = parser.parse_args()
    ranks = distributed.start(distributed.prepare_environment("auto"), timeout_minutes=10)
    if ranks.is_main:
        print("| model | 10⁶ parameters | ranks | ZeRO | compute | update, ms | bound, ms | ratio | flat, ms | GB/s |")
        print("|---|---:|---:|---:|---|---:|---:|---:|---:|---:|", flush=True)
    for name in arguments.models:
        for precision in arguments.precisions:
            for stage in arguments.stages:
                row = run_case(
                    name,
                    stage,
                    precision,
                    ranks,
                    repeats=arguments.repeats,
                    by_processor=arguments.processor_time,
                )
                if ranks.is_main:
                    print(row, flush=True)
                gc.collect()  # an engine holds itself in cycles
    distributed.leave(0, orderly=True)


if __name__ == "__main__":
    main()
