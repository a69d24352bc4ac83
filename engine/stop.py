"""SIGTERM and SIGINT: finish the step, agree over ranks, checkpoint, leave."""

import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

EXIT_STOPPED = 75
"""Exit code after a stop on request with a checkpoint (EX_TEMPFAIL: the same command continues the run)."""

GRACE_SECONDS = 5.0
"""Signals this soon after the first are echoes: a terminal signals ranks and launcher, which passes it on to ranks."""


class StopRequest:
    """Whether any rank was asked to stop; the first signal asks, one more after a while ends the process at once."""

    def __init__(self, control: dist.ProcessGroup | None, world_size: int) -> None:
        """Takes over SIGTERM and SIGINT; ``control`` is a group of CPU tensors, None for the default group."""
        self._control = control
        self._world_size = world_size
        self._asked = False
        self._asked_at = 0.0
        self._pending: tuple[torch.Tensor, dist.Work] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._asked:
            self._asked = True
            self._asked_at = time.monotonic()
        elif time.monotonic() - self._asked_at > GRACE_SECONDS:
            os._exit(128 + number)

    def agreed(self) -> bool:
        """Returns whether all ranks stop after this step; every rank must call it once a step.

        The answer is that of a sum started one step ago, so that no rank waits for it.
        """
        if self._world_size == 1:
            return self._asked
        answer = False
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            answer = bool(flag.item())
        flag = torch.tensor([int(self._asked)])
        work = dist.all_reduce(flag, group=self._control, async_op=True)
        assert work is not None
        self._pending = (flag, work)
        return answer

    def drain(self) -> None:
        """Waits for the sum still under way; call it before the group is used otherwise or destroyed."""
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None
