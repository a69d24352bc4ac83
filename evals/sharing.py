"""Work shared out over ranks, and failures that all of them hear of."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from maestri.engine.distributed import agree
from maestri.engine.errors import RunError
from maestri.pipelines.reader import TooManyBadSamples

Job = TypeVar("Job")
Result = TypeVar("Result")

FAILURES = (ValueError, RunError, OSError, TooManyBadSamples)
"""What data, files and settings can raise: a line for the user, no traceback."""

_logger = logging.getLogger(__name__)


def place() -> tuple[int, int]:
    """Returns this process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def agreeing() -> Iterator[None]:
    """Runs a block without collectives; if it fails on any rank, all of them raise.

    Raises:
        RunError: with several ranks; one rank alone raises what its block did.
    """
    failure: Exception | None = None
    alone = place()[1] == 1
    try:
        yield
    except Exception as error:  # raised below, on all ranks
        if alone:
            raise
        if not isinstance(error, FAILURES):
            _logger.error("a fault of the program", exc_info=error)
        failure = error
    if not alone:
        agree(failure)


def shared_out(jobs: Sequence[Job], work: Callable[[Job], Result]) -> list[Result]:
    """Returns the result of each job, in order; every rank must call it, and does a share of them.

    Args:
        jobs: the same on every rank.
        work: without collectives; its results travel between ranks, so they should be small.

    Raises:
        RunError: a job failed on some rank.
    """
    rank, world = place()
    own: list[Result] = []
    with agreeing():
        own = [work(job) for job in jobs[rank::world]]
    if world == 1:
        return own
    shares: list[list[Result]] = [[] for _ in range(world)]
    dist.all_gather_object(shares, own)
    return [shares[number % world][number // world] for number in range(len(jobs))]
