"""A recipe's real training step, on its real shards, run in one mode after the other."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from maestri.engine.build import build_loader, build_parts
from maestri.engine.config import RunConfig
from maestri.engine.continuation import Parts
from maestri.engine.distributed import Ranks, agree, wait_for_all
from maestri.engine.schedules import scheduled
from maestri.engine.step import set_schedules, train_step
from maestri.model.build import build_method
from maestri.pipelines.batch import Batch
from maestri.pipelines.loader import Loader
from maestri.profiler.clock import Laps
from maestri.profiler.findings import CACHED, COLD, CROWDED, REAL, RESIDENT, ModeTimes
from maestri.profiler.memory import outside_bytes, resident_bytes
from maestri.profiler.page_cache import drop_from_page_cache
from maestri.profiler.resident import repeated
from maestri.profiler.timeline import Timeline
from maestri.shards.shard_set import ShardSet

WARM_UP = 2
"""Steps after each change of mode that do not count, besides those that the loader has made ahead."""


class Trial:
    """A run that is built and never ends; each call makes some of its steps."""

    def __init__(self, config: RunConfig, parts: Parts, shard_set: ShardSet, loader: Loader) -> None:
        """Takes a first batch, which will be the resident one."""
        self.config = config
        self.parts = parts
        self.shard_set = shard_set
        self.loader = loader
        self.ranks = parts.ranks
        host, device = resident_bytes(), outside_bytes(self.ranks.device)
        self.resident = next(loader)
        self.data_path_bytes = {
            "host": max(0, resident_bytes() - host),
            "device": max(0, outside_bytes(self.ranks.device) - device),
        }
        """By which the first batch raised the memory of the host's process, and of a GPU outside of torch: batches made
        ahead, decoders, DALI's pools."""
        self._step = 0
        # What other modes read again and again, and, ahead of it, what only the real mode reads: once.
        self._position: int = loader.state_dict()["position"]
        self._fresh = self._position

    @property
    def ahead(self) -> int:
        """Micro-batches that the loader may have ready when a mode begins."""
        return self.config.data.prefetch + 2

    def mode(self, name: str, steps: int, on_step: Callable[[], None]) -> tuple[list[float], float]:
        """Returns seconds of each step in a mode, of the slowest rank, and what a step waited for data; all ranks call.

        Args:
            name: one of ``findings.MODES``.
            steps: that count.
            on_step: called after each step.
        """
        if name == RESIDENT:
            return self._timed(repeated(self.resident), steps, on_step, warm_up=WARM_UP)
        if name == CROWDED:
            with self._neighbour() as batches:
                return self._timed(batches, steps, on_step, warm_up=WARM_UP)
        span = (WARM_UP + self.ahead + steps) * self.config.batch.accumulation
        if name == CACHED:
            self._go_to(self._position)
            self._pass_over(span)
        elif name == COLD:
            drop_from_page_cache(self.shard_set)
        self._go_to(self._fresh_position(span) if name == REAL else self._position)
        # What was made ahead, while other modes ran, would hide the loader's own pace.
        return self._timed(self.loader, steps, on_step, warm_up=WARM_UP + self.ahead // self.config.batch.accumulation)

    def _fresh_position(self, span: int) -> int:
        """Returns where so many micro-batches begin that no mode has read; a small set comes round again."""
        size = self.config.batch.micro_size
        begin: int = max(self._fresh, self._position + span * size)
        self._fresh = begin + span * size
        return begin

    def loader_alone(self, steps: int) -> float:
        """Returns images per second of the loader when nothing else runs, over all ranks; every rank calls it."""
        accumulation = self.config.batch.accumulation
        self._go_to(self._position)
        self._pass_over((WARM_UP + self.ahead) * accumulation)
        wait_for_all()
        began = time.perf_counter()
        self._pass_over(steps * accumulation)
        self._synchronise()
        seconds = _slowest([time.perf_counter() - began], self.ranks)[0]
        return steps * self.config.batch.global_size / seconds

    def traced(self, timeline: Timeline, steps: int, on_step: Callable[[], None]) -> None:
        """Makes steps of the real run inside an entered timeline, after some that it does not see."""
        self._go_to(self._fresh_position((WARM_UP + self.ahead + steps) * self.config.batch.accumulation))
        for _ in range(WARM_UP):
            self.step(self.loader)
        for _ in range(steps):
            with timeline.step():
                self.step(self.loader)
            on_step()
        self._synchronise()

    def step(self, batches: Iterator[Batch]) -> None:
        """Makes an optimizer step, as the training loop does."""
        config, parts = self.config, self.parts
        at = min(self._step, config.steps - 1)
        settings = scheduled(config.optimizer, at, num_steps=config.steps, global_size=config.batch.global_size)
        set_schedules(parts.engine, settings)
        train_step(parts.engine, parts.method, parts.teachers, batches, at, guard=parts.guard)
        self._step += 1

    def _timed(
        self, batches: Iterator[Batch], steps: int, on_step: Callable[[], None], *, warm_up: int
    ) -> tuple[list[float], float]:
        for _ in range(warm_up):
            self.step(batches)
        self._synchronise()
        wait_for_all()
        laps, waited = Laps(self.ranks.device), self.loader.wait_seconds
        for _ in range(steps):
            with laps.measure("step"):
                self.step(batches)
            on_step()
        seconds = _slowest(laps.take_laps()["step"], self.ranks)
        return seconds, (self.loader.wait_seconds - waited) / steps

    @contextmanager
    def _neighbour(self) -> Iterator[Iterator[Batch]]:
        """Yields the resident batch again and again, while a thread takes as many batches from the loader."""
        self._go_to(self._position)
        asked, ended = threading.Semaphore(0), threading.Event()
        failures: list[Exception] = []

        def take() -> None:
            try:
                # On a GPU, a stream of its own: the model's must not wait for batches that it does not use.
                with torch.cuda.stream(torch.cuda.Stream(self.ranks.device)) if self._on_gpu else nullcontext():
                    while asked.acquire() and not ended.is_set():
                        next(self.loader)
            except Exception as error:  # told where the step can fail
                failures.append(error)

        def batches() -> Iterator[Batch]:
            while True:
                asked.release()
                yield self.resident

        thread = threading.Thread(target=take, name="neighbour", daemon=True)
        thread.start()
        try:
            yield batches()
        finally:
            ended.set()
            asked.release()
            thread.join()
        if failures:
            raise failures[0]

    def _pass_over(self, micro_batches: int) -> None:
        for _ in range(micro_batches):
            next(self.loader)

    def _go_to(self, position: int) -> None:
        self.loader.load_state_dict({**self.loader.state_dict(), "position": position})

    @property
    def _on_gpu(self) -> bool:
        return self.ranks.device.type == "cuda"

    def _synchronise(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self.ranks.device)


def _slowest(seconds: list[float], ranks: Ranks) -> list[float]:
    """Returns, of each, the longest of all ranks."""
    if ranks.world_size == 1:
        return seconds
    longest = torch.tensor(seconds, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    found: list[float] = longest.tolist()
    return found


@contextmanager
def opened_trial(config: RunConfig, ranks: Ranks, folder: Path) -> Iterator[Trial]:
    """Yields a recipe's run, built as train.py builds it; every rank calls it.

    Args:
        config: the recipe's.
        ranks: this process's place.
        folder: for what a run would leave.

    Raises:
        RunError: on every rank, for shards or settings that training would refuse on any.
    """
    config = replace(config, out=str(folder))
    with ExitStack() as stack:
        failure = None
        try:
            shard_set = stack.enter_context(ShardSet.open(config.data.shards))
            loader = stack.enter_context(build_loader(config, shard_set, ranks))
            method = build_method(
                config.method, config.encoder, image_size=config.views.size, num_steps=config.steps, seed=config.seed
            )
        except (ValueError, OSError) as error:
            failure = error
        agree(failure)
        parts = build_parts(config, method, shard_set, loader, ranks)
        stack.callback(parts.engine.destroy)
        yield Trial(config, parts, shard_set, loader)


@contextmanager
def other_loader(trial: Trial, config: RunConfig) -> Iterator[None]:
    """Lets a trial read by another configuration's ``data`` and ``views`` inside the block; shapes must be the same."""
    own, own_config = trial.loader, trial.config
    with build_loader(config, trial.shard_set, trial.ranks) as loader:
        trial.loader, trial.config = loader, config
        try:
            yield
        finally:
            trial.loader, trial.config = own, own_config


def mode_times(found: list[tuple[list[float], float]]) -> ModeTimes:
    """Returns what ``Trial.mode`` gave, round by round, as one."""
    return ModeTimes(seconds=[seconds for seconds, _ in found], waits=[waited for _, waited in found])
