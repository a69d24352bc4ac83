"""Steps whose loss is not finite: skipped on all ranks, counted, and their samples written down."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from maestri.engine.distributed import Ranks
from maestri.engine.errors import NonFiniteLoss
from maestri.pipelines.batch import Batch


class FiniteGuard:
    """Agrees over ranks on whether a loss is finite, and lets DeepSpeed drop the step where it is not.

    Nothing waits for the device's queue to run empty: the answer is on its way to the host while the backward pass
    runs, and is read before the optimizer's step.
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        folder: Path,
        budget: int,
        check_gradients: bool,
        keys_of: Callable[[Sequence[int]], Sequence[str]],
    ) -> None:
        """Starts with no step skipped.

        Args:
            folder: where samples of skipped steps are written down.
            budget: steps that may be skipped.
            check_gradients: whether to look at gradients, too, where DeepSpeed would not.
            keys_of: the samples' keys, by row of the data set.
        """
        self.skipped = 0
        """Optimizer steps skipped in the whole run."""
        self._ranks = ranks
        self._folder = folder
        self._budget = budget
        self._check_gradients = check_gradients
        self._keys_of = keys_of
        self._on_gpu = ranks.device.type == "cuda"
        self._flag = torch.zeros(1, pin_memory=self._on_gpu)
        self._ready: Any = None
        self._stream = torch.cuda.Stream(ranks.device) if self._on_gpu else None

    def watch(self, loss: Tensor) -> Tensor:
        """Starts to agree on ``loss``, and returns what backward is to be called with; every rank must call it.

        That is the same value, bit by bit, if this rank's is finite; else all gradients become NaN, for DeepSpeed's own
        check to see.
        """
        finite = torch.isfinite(loss.detach())
        bad = (~finite).float().view(1)
        if self._stream is None:
            if dist.get_world_size() > 1:
                self._ready = dist.all_reduce(bad, op=dist.ReduceOp.MAX, async_op=True)
            self._flag = bad
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._ranks.device))
            with torch.cuda.stream(self._stream):
                if dist.get_world_size() > 1:
                    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
                self._flag.copy_(bad, non_blocking=True)
                bad.record_stream(self._stream)
                self._ready = self._stream.record_event()
        return loss * torch.where(finite, 1.0, torch.nan)

    def was_finite(self) -> bool:
        """Returns whether the loss last watched is finite on every rank; waits for the forward pass at most."""
        if self._stream is not None:
            self._ready.synchronize()
        elif self._ready is not None:
            self._ready.wait()
        return not self._flag.item()

    def step(self, engine: Any, *, drop: bool) -> bool:
        """Runs ``engine.step()`` at the end of accumulation; returns whether weights have changed.

        Args:
            engine: DeepSpeed's.
            drop: whether gradients are to be dropped, because a loss was not finite; the same on every rank.
        """
        optimizer = engine.optimizer
        if hasattr(optimizer, "check_grad_overflow"):  # ZeRO 1 and 2, which look only if told to
            optimizer.check_grad_overflow = drop or self._check_gradients
        elif not hasattr(optimizer, "overflow"):  # ZeRO 0 in fp32 is torch's own AdamW, which never looks
            drop = drop or (self._check_gradients and not _are_gradients_finite(engine.module))
            if drop:
                optimizer.step = lambda: None
        elif not self._check_gradients and hasattr(optimizer, "overflow_checker"):
            # ZeRO 0 in bf16 would ask every parameter's gradient, and wait for a GPU each time.
            optimizer.overflow_checker.check = lambda: drop
        try:
            engine.step()
        finally:
            if "step" in vars(optimizer):
                del optimizer.step
        return bool(engine.was_step_applied()) and not drop

    def note(self, batch: Batch, loss: Tensor, *, step: int) -> None:
        """Writes a micro-batch of a step (0-based) that is skipped into this rank's file."""
        rows = batch.rows.tolist()
        found = {"step": step + 1, "loss": str(loss.item()), "rows": rows, "keys": list(self._keys_of(rows))}
        with suppress(OSError):  # the steps are counted, too; a full disk must not end the run here
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"rank_{self._ranks.rank:05d}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")

    def count(self, step: int) -> None:
        """Counts a step (0-based) that was skipped.

        Raises:
            NonFiniteLoss: those are more than the budget allows.
        """
        self.skipped += 1
        if self.skipped > self._budget:
            raise NonFiniteLoss(step + 1, skipped=self.skipped, folder=self._folder)


def _are_gradients_finite(module: nn.Module) -> bool:
    found = [parameter.grad.isfinite().all() for parameter in module.parameters() if parameter.grad is not None]
    return bool(torch.stack(found).all())
