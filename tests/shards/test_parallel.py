"""Work in processes: in order, and the first failure ends it."""

import operator
from typing import Any

import pytest

from maestri.shards.parallel import in_processes, worker_context
from maestri.shards.worker import Counters, become_worker


def run(arguments: list[tuple[Any, ...]], told: list[int], counters: Counters) -> Any:
    return in_processes(
        operator.floordiv, arguments, workers=2, counters=counters, initializer=become_worker, initargs=(),
        tell=lambda: told.append(1),
    )  # fmt: skip


def test_in_processes__keeps_the_order_of_many() -> None:
    counters, told = Counters(worker_context(), 1), []
    assert list(run([(number, 1) for number in range(200)], told, counters)) == list(range(200))
    assert told and counters.is_stopped
    assert list(run([], told, counters)) == []


def test_in_processes__a_failure_is_raised_and_asks_workers_to_stop() -> None:
    counters = Counters(worker_context(), 1)
    with pytest.raises(ZeroDivisionError):
        list(run([(1, 1), (2, 0), *[(3, 1)] * 100], [], counters))
    assert counters.is_stopped
