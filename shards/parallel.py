"""The same work on each of many shards, in several processes, told as it goes."""

import itertools
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
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


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Tells nobody."""


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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["maestri.shards.worker", "maestri.shards.webdataset_writer"])
    counters = Counters(context, len(tasks))
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=context, initializer=_start, initargs=(counters, work)
    )
    waiting = iter(enumerate(tasks))
    futures: deque[Future[_Result]] = deque()
    try:
        while True:
            futures.extend(pool.submit(_run, *one) for one in itertools.islice(waiting, 2 * workers - len(futures)))
            if not futures:
                break
            wait((futures[0],), timeout=POLL_SECONDS)
            report(_progress(counters))
            if futures[0].done():
                yield futures.popleft().result()
    except BrokenProcessPool:
        raise ShardError("a worker process died, maybe for lack of memory; run the same command again") from None
    finally:
        counters.stop()
        pool.shutdown(cancel_futures=True)
    report(_progress(counters))


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
