"""Python's garbage collection in step on all ranks: else each stops when it likes, and the others wait for it."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collected_in_step(every: int) -> Iterator[Callable[[int], None]]:
    """Turns automatic collection off inside the block; yields what collects after each ``every`` optimizer steps.

    What there is at the start is passed over inside the block.  With ``every`` = 0 Python goes on by itself.
    """
    if not every:
        yield lambda step: None
        return

    def collect(step: int) -> None:
        if step % every == 0:
            gc.collect()

    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield collect
    finally:
        gc.unfreeze()
        gc.enable()
