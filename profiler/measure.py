"""A profile of a recipe: modes in turns, the loader alone, parts of the step, FLOPs, memory."""

import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from maestri.engine.config import RunConfig
from maestri.engine.distributed import Ranks
from maestri.engine.start import COMPUTE_DTYPES
from maestri.pipelines.executor import choose_executor
from maestri.profiler.causes import Evidence, Judgement, judge
from maestri.profiler.experiments import try_gains
from maestri.profiler.findings import (
    CACHED,
    COLD,
    CROWDED,
    REAL,
    RESIDENT,
    Mark,
    Moment,
    Part,
    Profile,
    RankSummary,
    Stage,
    Wait,
)
from maestri.profiler.flops import FlopCounter
from maestri.profiler.memory import host_bytes, resident_bytes, step_bytes, step_curve
from maestri.profiler.memory_curve import peak_by_part, thinned
from maestri.profiler.page_cache import bytes_in_page_cache
from maestri.profiler.parts import parts_of
from maestri.profiler.peak import Peak, measure_peak
from maestri.profiler.resident import repeated
from maestri.profiler.timeline import follow_run, seconds_by_part, shown, timeline_of
from maestri.profiler.trial import WARM_UP, Trial, mode_times, opened_trial
from maestri.profiler.waits import WaitFinder

LEAK = 5e5
"""Bytes a step from which on growing memory is told of."""
TRACED_STEPS = 10
"""Steps whose parts are timed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much is measured."""

    steps: int
    """Optimizer steps of each mode in a round."""
    rounds: int
    """In each of which every mode has its turn."""
    cold: bool = True
    """Whether shards are dropped from the page cache for a mode of its own."""
    experiments: bool = True
    """Whether expected gains are tried, where that can be done."""

    @property
    def modes(self) -> tuple[str, ...]:
        """Those that are measured."""
        return (REAL, RESIDENT, CACHED, CROWDED) + (COLD,) * self.cold

    @property
    def num_steps(self) -> int:
        """How often ``on_step`` is called, experiments apart."""
        return len(self.modes) * self.rounds * self.steps + TRACED_STEPS


@dataclass(kw_only=True)
class Collected:
    """What has been measured so far: an interruption loses none of it."""

    title: str
    hardware: dict[str, str]
    settings: dict[str, str]
    images: int
    world_size: int
    peak: Peak | None = None
    modes: defaultdict[str, list[tuple[list[float], float]]] = field(default_factory=lambda: defaultdict(list))
    loader: list[float] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    steps: list[list[Mark]] = field(default_factory=list)
    flops: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    memory_peak: dict[str, int] = field(default_factory=dict)
    memory_curve: list[Moment] = field(default_factory=list)
    host_memory: dict[str, int] = field(default_factory=dict)
    waits: list[Wait] = field(default_factory=list)
    ranks: list[RankSummary] = field(default_factory=list)
    growth: list[float] = field(default_factory=list)
    remark: str = "Ended before there was enough for a verdict."
    judgement: Judgement | None = None

    def profile(self, *, complete: bool) -> Profile:
        """Returns it as a profile.

        Raises:
            ValueError: not even a round of one mode was measured.
        """
        if not self.modes:
            raise ValueError("nothing was measured: it ended before the first round of steps did")
        judgement = self.judgement or Judgement(stall=0.0, cause="", gains=[], noise=0.0, verdict=self.remark)
        growth = statistics.median(self.growth) if self.growth else 0.0
        by_step = [seconds_by_part(marks) for marks in self.steps]
        names = dict.fromkeys(name for parts in by_step for name in parts)
        parts = [
            Part(name=name, seconds=[found.get(name, 0.0) for found in by_step], flops=self.flops.get(name, 0))
            for name in names
        ]
        return Profile(
            title=self.title,
            hardware=self.hardware,
            settings=self.settings,
            images=self.images,
            world_size=self.world_size,
            modes={name: mode_times(found) for name, found in self.modes.items()},
            loader_images_per_second=self.loader,
            parts=sorted(parts, key=lambda part: -part.median),
            timeline=shown(median_step(self.steps)) if self.steps else [],
            stages=self.stages,
            ranks=self.ranks,
            flops_per_second=self.peak.flops_per_second if self.peak else 0.0,
            bytes_per_second=self.peak.bytes_per_second if self.peak else 0.0,
            memory=self.memory,
            memory_peak=self.memory_peak,
            memory_curve=self.memory_curve,
            host_memory=self.host_memory,
            waits=self.waits,
            stall=judgement.stall,
            cause=judgement.cause,
            gains=judgement.gains,
            noise=judgement.noise,
            growth=growth,
            verdict=judgement.verdict + (f" Memory grows by {growth / 1e6:.1f} MB a step." if growth > LEAK else ""),
            complete=complete,
        )


def new_collection(config: RunConfig, ranks: Ranks, *, recipe: str) -> Collected:
    """Returns an empty collection."""
    return Collected(
        title=f"{recipe}: {config.method.name}, {ranks.world_size} × {ranks.device.type}, {config.engine.precision}, "
        f"ZeRO {config.engine.zero_stage}",
        hardware=hardware(ranks),
        settings=settings_of(config, ranks),
        images=config.batch.global_size,
        world_size=ranks.world_size,
    )


def measure_profile(
    config: RunConfig, ranks: Ranks, plan: Plan, found: Collected, *, folder: Path, on_step: Callable[[], None]
) -> None:
    """Fills ``found``; every rank must call it.

    Args:
        folder: for what a run would leave.
        on_step: called after each step that counts.

    Raises:
        RunError: on every rank, for shards or settings that training would refuse on any.
    """
    found.peak = measure_peak(ranks.device, COMPUTE_DTYPES[config.engine.precision])
    with opened_trial(config, ranks, folder) as trial:
        for number in range(plan.rounds):
            found.loader.append(trial.loader_alone(plan.steps))
            first = number % len(plan.modes)
            for name in plan.modes[first:] + plan.modes[:first]:
                before = used_bytes(ranks)
                measured = trial.mode(name, plan.steps, on_step)  # before the list is made: it may be interrupted
                found.modes[name].append(measured)
                if name == RESIDENT:
                    found.growth.append((used_bytes(ranks) - before) / (plan.steps + WARM_UP))
        found.stages = stages_of(trial, steps=plan.steps)
        trace_parts(trial, found, on_step)
        measure_memory(trial, found)
        evidence = evidence_of(config, ranks, found)
        found.judgement = judge(evidence)
        if plan.experiments:
            found.judgement.gains[:] = try_gains(trial, evidence, found.judgement.gains, plan.steps, plan.rounds)


def measure_memory(trial: Trial, found: Collected) -> None:
    """Books memory by owner and over a step, and what makes the host wait in one."""
    batches = repeated(trial.resident)
    found.memory = step_bytes(trial.parts, trial.resident, trial.step)
    curve = step_curve(trial.parts, trial.resident, found.memory, lambda: trial.step(batches))
    found.memory_peak, found.memory_curve = peak_by_part(curve), thinned(curve)
    found.memory["data path"] = trial.data_path_bytes["device"]
    found.host_memory = host_bytes(trial.ranks) | {"data path": trial.data_path_bytes["host"]}
    cached = bytes_in_page_cache(trial.shard_set)
    if cached is not None:
        found.host_memory["page cache"] = cached
    with torch.compiler.set_stance("force_eager"), WaitFinder(trial.ranks.device) as waits:
        trial.step(batches)
    found.waits = waits.waits


def used_bytes(ranks: Ranks) -> int:
    """Returns what the model's device holds now: of a GPU what is allocated, of a host what this process has."""
    if ranks.device.type == "cuda":
        return torch.cuda.memory_allocated(ranks.device)
    return resident_bytes()


def trace_parts(trial: Trial, found: Collected, on_step: Callable[[], None]) -> None:
    """Times the parts of some steps, and counts the FLOPs of one."""
    with timeline_of(trial.parts) as timeline:
        follow_run(timeline, trial.parts)
        trial.traced(timeline, TRACED_STEPS, on_step)
    found.steps = timeline.marks()
    # What torch has compiled is not seen by the counter.
    with torch.compiler.set_stance("force_eager"), FlopCounter(parts_of(trial.parts.method)) as counter:
        trial.step(repeated(trial.resident))
    found.flops = counter.by_part
    own = {
        name: statistics.median(parts.get(name, 0.0) for parts in map(seconds_by_part, found.steps))
        for name in dict.fromkeys(mark.name for marks in found.steps for mark in marks)
    }
    everyone: list[Any] = [own]
    if trial.ranks.world_size > 1:
        everyone = [None] * trial.ranks.world_size
        dist.all_gather_object(everyone, own, group=trial.parts.control)
    found.ranks = [RankSummary(rank=rank, parts=parts) for rank, parts in enumerate(everyone)]


def stages_of(trial: Trial, *, steps: int) -> list[Stage]:
    """Returns the stages of the data path, measured with nothing beside it."""
    whole = stage_seconds(trial, steps=steps, clock=time.perf_counter)
    busy = stage_seconds(trial, steps=steps, clock=time.thread_time)
    data = trial.config.data
    threads = {"read": data.read_threads, "order": 1, "plan": 1, "DALI": 1}
    return [
        Stage(
            name=name,
            seconds_per_image=seconds,
            threads=threads.get(name, data.num_threads),
            pool="" if name in threads else "executor",
            busy_seconds_per_image=None if name == "DALI" else min(busy[name], seconds),  # its threads are its own
        )
        for name, seconds in whole.items()
    ]


def stage_seconds(trial: Trial, *, steps: int, clock: Callable[[], float]) -> dict[str, float]:
    """Returns seconds an image takes in each stage, by a clock, of the loader with nothing beside it."""
    stages = trial.loader.stages
    stages.clock = clock
    try:
        before = stages.seconds()
        trial.loader_alone(steps)
        after = stages.seconds()
    finally:
        stages.clock = time.perf_counter
    images = (steps + 2 + trial.ahead) * trial.config.batch.global_size / trial.ranks.world_size
    return {name: (seconds - before.get(name, 0.0)) / images for name, seconds in after.items()}


def evidence_of(config: RunConfig, ranks: Ranks, found: Collected) -> Evidence:
    """Returns what the judgement rests on."""
    parts = found.ranks[0].parts if found.ranks else {}
    return Evidence(
        modes={name: mode_times(times) for name, times in found.modes.items()},
        images=config.batch.global_size // ranks.world_size,
        world_size=ranks.world_size,
        stages=found.stages,
        loader_rate=statistics.median(found.loader) / ranks.world_size,
        parts=parts,
        cores=cores_of(ranks),
        num_threads=config.data.num_threads,
        read_threads=config.data.read_threads,
        on_gpu=ranks.device.type == "cuda",
    )


def cores_of(ranks: Ranks) -> int:
    """Returns how many cores a rank has to itself, where those of a machine share them: the same on every rank."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = torch.tensor([max(1, len(os.sched_getaffinity(0)) // local_ranks)], device=ranks.device)
    if ranks.world_size > 1:
        dist.all_reduce(cores, op=dist.ReduceOp.MIN)
    return int(cores.item())


def median_step(steps: list[list[Mark]]) -> list[Mark]:
    """Returns the step whose length is in the middle."""
    ordered = sorted(steps, key=lambda marks: marks[-1].end if marks else 0.0)
    return ordered[len(ordered) // 2]


def settings_of(config: RunConfig, ranks: Ranks) -> dict[str, str]:
    """Returns the settings that a reader should know."""
    encoder, views, data = config.encoder, config.views, config.data
    local = f" + {views.local.count} × {views.local.size}" if views.local.count else ""
    return {
        "encoder": f"dim {encoder.dim}, depth {encoder.depth}, patch {encoder.patch}",
        "views": f"{views.count} × {views.size}{local}",
        "batch": f"{config.batch.global_size} images, {config.batch.accumulation} micro-batches",
        "data": f"{choose_executor(data.executor, ranks.device)}, num_threads {data.num_threads}, "
        f"read_threads {data.read_threads}, prefetch {data.prefetch}",
        "engine": f"threads {torch.get_num_threads()}, compile {config.engine.compile}, "
        f"activation_checkpointing {config.engine.activation_checkpointing}, offload {config.engine.offload}",
    }


def hardware(ranks: Ranks) -> dict[str, str]:
    """Returns what this process runs on."""
    model = platform.processor() or platform.machine()
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    found = {"cpu": model, "cores": str(len(os.sched_getaffinity(0))), "torch": torch.__version__}
    if ranks.device.type == "cuda":
        found = {"gpu": torch.cuda.get_device_name(ranks.device)} | found
    return found
