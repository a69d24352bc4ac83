"""Work ahead of its consumer: order, errors, the watchdog, the end."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from maestri.pipelines.ahead import Ahead, LoaderStuck
from maestri.pipelines.stages import Stages


def _ahead(make, *, depth: int = 1, timeout: float = 10.0, stages: Stages | None = None) -> Ahead[int]:
    return Ahead(
        make,
        tensors=lambda item: (),
        device=torch.device("cpu"),
        depth=depth,
        timeout=timeout,
        stages=stages or Stages(),
        name="ahead-under-test",
    )


def _num_alive() -> int:
    return sum(thread.name == "ahead-under-test" for thread in threading.enumerate())


def test_next__in_order_to_the_end() -> None:
    ahead = _ahead(lambda: iter(range(5)))
    assert list(ahead) == [0, 1, 2, 3, 4]
    with pytest.raises(StopIteration):
        next(ahead)
    ahead.close()
    assert _num_alive() == 0


@pytest.mark.parametrize("depth", [1, 3])
def test_next__no_more_than_depth_waits(depth: int) -> None:
    made = []

    def make() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    ahead = _ahead(make, depth=depth)
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while len(made) < depth + 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == depth + 1
    ahead.close()


def test_next__an_error_comes_after_the_items_before_it_and_again() -> None:
    def make() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("the disk is gone")

    ahead = _ahead(make, depth=5)
    assert [next(ahead), next(ahead)] == [1, 2]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(ahead)
    ahead.close()


def test_next__names_the_stuck_stage() -> None:
    stages, release = Stages(), threading.Event()

    def make() -> Iterator[int]:
        yield 1
        with stages.at("read", "of shard 7"):
            release.wait(20)
        yield 2

    ahead = _ahead(make, timeout=0.3, stages=stages)
    assert next(ahead) == 1
    with pytest.raises(LoaderStuck, match=r"no batch for 0.3 s; .* read of shard 7 for 0 s.*data.timeout") as caught:
        next(ahead)
    assert caught.value.seconds == 0.3
    release.set()
    assert next(ahead) == 2
    ahead.close()
    assert _num_alive() == 0


def test_close__runs_the_generators_end_in_its_thread() -> None:
    ended = []

    def make() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            ended.append(threading.current_thread().name)

    ahead = _ahead(make)
    next(ahead)
    ahead.close()
    ahead.close()
    assert ended == ["ahead-under-test"]
    assert _num_alive() == 0


def test_close__before_the_first_item() -> None:
    _ahead(lambda: iter(range(5))).close()
    assert _num_alive() == 0


def test_stages__seconds_add_up_over_threads() -> None:
    stages = Stages()

    def work() -> None:
        with stages.at("sleep"):
            time.sleep(0.1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stages.seconds()["sleep"] >= 0.3
    assert stages.stuck() == "no stage"


def test_next__a_stream_that_cannot_be_made_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise RuntimeError("no memory for a stream")

    monkeypatch.setattr(torch.cuda, "Stream", refuse)
    ahead = Ahead(
        lambda: iter((1,)),
        tensors=lambda item: (),
        device=torch.device("cuda", 0),
        depth=1,
        timeout=5.0,
        stages=Stages(),
        name="ahead-under-test",
    )
    with pytest.raises(RuntimeError, match="no memory for a stream"):
        next(ahead)
    ahead.close()
