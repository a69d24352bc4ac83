"""Work in processes: in order, and the first failure ends it."""

import functools
import operator
import signal
import time
from typing import Any

import pytest

from maestri.shards.parallel import in_processes, prepare_workers, worker_context
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


def test_in_processes__idle_workers_get_spare_work() -> None:
    counters, given = Counters(worker_context(), 1), []

    def spare() -> Any:
        given.append(1)
        return functools.partial(time.sleep, 0.01) if len(given) < 20 else None

    found = in_processes(
        time.sleep, [(0.5,)], workers=2, counters=counters, initializer=become_worker, initargs=(), tell=lambda: None,
        spare=spare,
    )  # fmt: skip
    assert list(found) == [None]
    assert len(given) >= 20


def test_in_processes__failed_spare_work_is_a_failure() -> None:
    counters, given = Counters(worker_context(), 1), [functools.partial(operator.floordiv, 1, 0)]
    found = in_processes(
        time.sleep, [(0.5,)], workers=2, counters=counters, initializer=become_worker, initargs=(), tell=lambda: None,
        spare=lambda: given.pop() if given else None,
    )  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        list(found)


def test_prepare_workers__leaves_ctrl_c_to_this_process() -> None:
    prepare_workers()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    prepare_workers()  # there is one already
    assert list(run([(6, 3)], [], Counters(worker_context(), 1))) == [2]
