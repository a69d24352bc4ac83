"""The same work on each of many shards, in several processes, told as it goes."""

import itertools
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any, TypeVar

from PIL import Image

from maestri.shards.errors import ShardError
from maestri.shards.images import MAX_PIXELS
from maestri.shards.worker import Counters, Stopped, become_worker

POLL_SECONDS = 0.2

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
Count = Callable[[int, int, int], None]
"""Takes images, bytes and bad images that were just dealt with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far the work is."""

    images: int = 0
    """Done."""
    bytes: int = 0
    """Done."""
    bad: int = 0
    """Among the images."""
    total_images: int = 0
    """To do in all, where that is known."""
    total_bytes: int = 0
    """To do in all, where that is known."""
    resumed_images: int = 0
    """Of those done, found done at the start."""


Report = Callable[[Progress], None]
Spare = Callable[[], Callable[[], object] | None]
"""Returns work for a worker that has none, picklable; None where there is none."""


def silent(progress: Progress) -> None:
    """Tells nobody."""


def nothing() -> None:
    """Has no work to spare."""


def over_shards(
    work: Callable[[_Task, Count], _Result], tasks: Sequence[_Task], *, workers: int, report: Report = silent
) -> Iterator[_Result]:
    """Yields the work's results in the order of tasks.

    Args:
        work: a function of a module, which is pickled by name; calls ``Count`` every now and then.
        tasks: small and picklable.
        workers: processes; one shard, or one worker, is looked after in this very process.
        report: called about five times a second.

    Raises:
        ShardError: the work raised it, or a process died.
        OSError: the work raised it.
    """
    if not tasks:
        return
    if min(workers, len(tasks)) == 1:
        yield from _here(work, tasks, report)
        return
    counters = Counters(worker_context(), len(tasks))
    yield from in_processes(
        _run, enumerate(tasks), workers=min(workers, len(tasks)), counters=counters, initializer=_start,
        initargs=(counters, work), tell=lambda: report(_progress(counters)),
    )  # fmt: skip


def worker_context() -> ForkServerContext:
    """Returns how worker processes are started: from a process that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["maestri.shards.worker", "maestri.shards.webdataset_writer"])
    return context


def prepare_workers() -> None:
    """Lets the process that workers are forked from import what they need, while this one does something else."""
    worker_context()
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is this process's matter
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


def in_processes(
    function: Callable[..., _Result],
    arguments: Iterable[tuple[Any, ...]],
    *,
    workers: int,
    counters: Counters,
    initializer: Callable[..., None],
    initargs: tuple[Any, ...],
    tell: Callable[[], None],
    spare: Spare = nothing,
    died_at: Callable[[], str] = str,
) -> Iterator[_Result]:
    """Yields a function's results in the order of its arguments; the first failure ends it all at once.

    Args:
        function: of a module.
        arguments: for each call; two for each worker are made in advance.
        workers: processes.
        counters: what the workers look at to know whether to stop.
        initializer: called in each new process, with ``initargs``.
        initargs: for ``initializer``.
        tell: called about five times a second, and at the end.
        spare: asked for other work where a worker would wait for others; nobody waits for what comes of it.
        died_at: returns where workers were, as part of a sentence, when one has died.

    Raises:
        ShardError: the function raised it, or a process died.
        OSError: the function raised it.
    """
    waiting = iter(arguments)
    futures: deque[Future[_Result]] = deque()
    extra: list[Future[Any]] = []
    pool = ProcessPoolExecutor(workers, mp_context=worker_context(), initializer=initializer, initargs=initargs)
    try:
        while True:
            busy = sum(not future.done() for future in futures)
            free = min(2 * workers - busy, 8 * workers - len(futures))  # a slow one holds up neither work nor memory
            futures.extend(pool.submit(function, *one) for one in itertools.islice(waiting, max(free, 0)))
            if not futures:
                break
            unfinished: list[Future[Any]] = [future for future in futures if not future.done()]
            while len(unfinished) + len(extra) < workers and (work := spare()) is not None:
                extra.append(pool.submit(work))
            if unfinished and not futures[0].done():
                wait([*unfinished, *extra], timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")
            tell()
            for future in futures:
                if future.done():
                    future.result()  # raises what it failed with
            for future in [future for future in extra if future.done()]:
                future.result()
                extra.remove(future)
            while futures and futures[0].done():
                yield futures.popleft().result()
    except BrokenProcessPool:
        died = f"a worker process died{died_at()} (out of memory?)"
        raise ShardError(f"{died}; run the same command again") from None
    finally:
        counters.stop()
        pool.shutdown(cancel_futures=True)
    tell()


def _here(work: Callable[[_Task, Count], _Result], tasks: Sequence[_Task], report: Report) -> Iterator[_Result]:
    done, told = Progress(), 0.0

    def count(images: int, size: int, bad: int) -> None:
        nonlocal done, told
        done = Progress(images=done.images + images, bytes=done.bytes + size, bad=done.bad + bad)
        if time.monotonic() - told > POLL_SECONDS:
            report(done)
            told = time.monotonic()

    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above, and refuses twice as many
    try:
        for task in tasks:
            yield work(task, count)
    finally:
        Image.MAX_IMAGE_PIXELS = before
    report(done)


def _progress(counters: Counters) -> Progress:
    images, size, bad = counters.totals()
    return Progress(images=images, bytes=size, bad=bad)


_state: dict[str, Any] = {}


def _start(counters: Counters, work: Callable[..., Any]) -> None:
    _state.update(counters=counters, work=work)
    become_worker()


def _run(number: int, task: Any) -> Any:
    counters: Counters = _state["counters"]

    def count(images: int, size: int, bad: int) -> None:
        counters.add(number, images=images, size=size, bad=bad)
        if counters.is_stopped:
            raise Stopped

    return _state["work"](task, count)
