"""Work done ahead of its consumer in a thread, with a limit to how long the consumer waits."""

import atexit
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from maestri.pipelines.stages import Stages

_logger = logging.getLogger(__name__)
_PATIENCE = 10.0
"""Seconds that closing waits for the thread to finish what it is at."""


class LoaderStuck(RuntimeError):
    """No batch came for too long."""

    def __init__(self, seconds: float, stages: str) -> None:
        """Names what the data path's threads were at."""
        super().__init__(
            f"no batch for {seconds:g} s; the data path is at: {stages}.  Is the storage reachable?  "
            "data.timeout is the limit, 0 for none"
        )
        self.seconds = seconds
        self.stages = stages


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Done(Generic[T]):
    """What the thread hands over: an item, with the event after which it is ready on a GPU; or the end."""

    item: T | None = None
    ready: Any = None
    error: BaseException | None = None


class Ahead(Generic[T]):
    """An iterator over another one's items, which a thread makes ahead of the consumer.

    On a GPU the thread works on a stream of its own; an item's tensors are ordered before what its consumer does with
    them, and their memory is not used again before that is done.
    """

    def __init__(
        self,
        make: Callable[[], Iterator[T]],
        *,
        tensors: Callable[[T], Iterable[Tensor]],
        device: torch.device,
        depth: int,
        timeout: float,
        stages: Stages,
        name: str,
    ) -> None:
        """Starts the thread.

        Args:
            make: returns the items' iterator; it is called, iterated and, if it is a generator, closed in the thread.
            tensors: returns the tensors of an item.
            device: where they are.
            depth: finished items that may wait for the consumer.
            timeout: seconds that the consumer waits for an item; 0 for ever.
            stages: where the threads note what they are at.
            name: of the thread.
        """
        self._make = make
        self._tensors = tensors
        self._device = device
        self._timeout = timeout
        self._stages = stages
        self._done: queue.SimpleQueue[_Done[T]] = queue.SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._stopping = False
        self._ended: _Done[T] | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        # A thread that is at work in a library when the interpreter ends brings the process down.
        atexit.register(self.close)
        self._thread.start()

    def __iter__(self) -> "Ahead[T]":
        """Returns itself."""
        return self

    def __next__(self) -> T:
        """Returns the next item.

        Raises:
            LoaderStuck: none came in time.
            Exception: the iterator's own, after the items that came before it.
        """
        if self._ended is None:
            try:
                done = self._done.get(timeout=self._timeout or None)
            except queue.Empty:
                raise LoaderStuck(self._timeout, self._stages.stuck()) from None
            if done.item is not None:
                self._room.release()
                self._order(done)
                return done.item
            self._ended = done
        if self._ended.error is not None:
            raise self._ended.error
        raise StopIteration

    def close(self) -> None:
        """Ends the thread; can be called twice, and is at the interpreter's exit."""
        atexit.unregister(self.close)
        self._stopping = True
        self._room.release()
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            _logger.warning("a thread of the data path doesn't end; it is at: %s", self._stages.stuck())
        elif self._ended is None:
            self._ended = _Done()

    def _work(self) -> None:
        """Makes items until the end, an error, or ``close``."""
        on_gpu = self._device.type == "cuda"
        stream: Any = None
        end: _Done[T] = _Done()
        items: Iterator[T] = iter(())
        try:
            if on_gpu:
                stream = torch.cuda.Stream(self._device)
            with torch.cuda.stream(stream) if on_gpu else nullcontext():
                items = self._make()
                while True:
                    self._room.acquire()
                    if self._stopping:
                        break
                    item = next(items)
                    self._done.put(_Done(item, stream.record_event() if on_gpu else None))
                    del item
        except StopIteration:
            pass
        except BaseException as error:  # carried to the consumer, who raises it
            end = _Done(error=error)
        finally:
            try:
                close = getattr(items, "close", None)
                if close is not None:
                    close()
            finally:
                self._done.put(end)

    def _order(self, done: _Done[T]) -> None:
        """Makes the consumer's stream wait for the item, and its memory wait for the consumer's stream."""
        if done.ready is None or done.item is None:
            return
        stream: Any = torch.cuda.current_stream(self._device)
        stream.wait_event(done.ready)
        for tensor in self._tensors(done.item):
            if tensor.is_cuda:
                tensor.record_stream(stream)
