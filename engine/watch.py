"""Tells which rank waits where when a step takes too long, and ends it; tells where a lost rank was."""

import json
import os
import sys
import threading
import time
from collections import defaultdict
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from maestri.engine.distributed import Ranks
from maestri.engine.errors import LostRank
from maestri.engine.spans import current_place

LONGEST_PERIOD = 10.0
"""Seconds at most between two words of a rank."""
LAST_WORDS = 2.0
"""Seconds that a rank which has met a failed collective waits for others' words; torchrun ends it soon."""
STORE_TIMEOUT = timedelta(seconds=20)
"""Of a word to or from rank 0's store."""
SILENT_PERIODS = 3.0
"""A rank that has said nothing for so many periods is called silent."""
LONG = ("start", "evaluation", "checkpoint")
"""Places that may take longer than a step."""
ENDLESS = (*LONG, "data", "")
"""Places where a rank does not end itself; what waits for data has a limit of its own."""
GRACE = 1.2
"""Multiple of the time-out after which a rank ends itself, because its collective has not: gloo's all-gather never does
(torch 2.15)."""
EXIT_FAILED = 1


class Watch:
    """Every rank's place in the program, told to a small store by a thread, and read when something is wrong."""

    def __init__(self, ranks: Ranks, *, timeout_seconds: float) -> None:
        """Starts the thread; every rank must call it.  One process alone has nobody to watch.

        Args:
            timeout_seconds: after which collectives fail; the stall is told at half of it.
        """
        self._ranks = ranks
        self._timeout = timeout_seconds
        self._period = min(LONGEST_PERIOD, timeout_seconds / 12)
        self._closed = threading.Event()
        self._step = 0
        self._seen, self._since = (0, ""), time.monotonic()
        self._told: tuple[int, str] | None = None
        self._store: Any = None
        if ranks.world_size > 1:
            self._store = _own_store(ranks)
            self._say()
            threading.Thread(target=self._run, name="watch", daemon=True).start()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the thread."""
        self._closed.set()

    def at(self, step: int) -> None:
        """Notes how many optimizer steps are done."""
        self._step = step

    def lost(self) -> str:
        """Returns where each rank was when it was last heard, for one that has met a failed collective; may be empty.

        Waits a moment, so that those that live can speak.
        """
        if self._store is None:
            return ""
        time.sleep(min(LAST_WORDS, 2 * self._period))
        return self._summary()

    def _run(self) -> None:
        while not self._closed.wait(self._period):
            try:
                self._say()
            except RuntimeError:  # rank 0, which keeps the store, is gone
                pass
            stalled = time.monotonic() - self._since
            is_news = self._ranks.is_main and self._told != self._seen and current_place() not in LONG
            if stalled > self._timeout / 2 and is_news:
                self._told = self._seen
                self._complain(f"no progress for {stalled:.0f} s: {self._summary()}")
            if stalled > GRACE * self._timeout and current_place() not in ENDLESS:
                self._complain(f"rank {self._ranks.rank}: {LostRank(self._summary())}")
                os._exit(EXIT_FAILED)

    def _complain(self, text: str) -> None:
        print(f"train.py: {text}", file=sys.stderr, flush=True)

    def _say(self) -> None:
        now = (self._step, current_place())
        if now != self._seen:
            self._seen, self._since = now, time.monotonic()
        word = {"step": now[0], "place": now[1], "at": time.time()}
        self._store.set(str(self._ranks.rank), json.dumps(word))

    def _summary(self) -> str:
        """Returns e.g. ``"rank 1 in data of step 12; rank 0, 2, 3 in backward of step 12"``; what lags comes first."""
        where: defaultdict[tuple[bool, int, str], list[int]] = defaultdict(list)
        for rank in range(self._ranks.world_size):
            try:
                word: dict[str, Any] = json.loads(self._store.get(str(rank)))
            except RuntimeError:
                return "rank 0 does not answer"
            silence = time.time() - word["at"]
            place = f"in {word['place']}" if word["place"] else "between the parts"
            text = f"{place} of step {word['step'] + 1}"
            speaks = silence <= SILENT_PERIODS * self._period
            if not speaks:
                text += f", silent for {silence:.0f} s"
            where[(speaks, word["step"], text)].append(rank)
        return "; ".join(f"rank {', '.join(map(str, ranks))} {key[2]}" for key, ranks in sorted(where.items()))


def _own_store(ranks: Ranks) -> Any:
    """Returns a store of rank 0's, apart from the launcher's, whose calls would wait behind collectives' own."""

    def store(port: int, *, is_master: bool) -> Any:
        return dist.TCPStore(  # type: ignore[attr-defined]  # torch does not list it
            os.environ["MASTER_ADDR"], port, is_master=is_master, wait_for_workers=False, timeout=STORE_TIMEOUT
        )

    own = store(0, is_master=True) if ranks.is_main else None
    port = [own.port if own else 0]
    dist.broadcast_object_list(port)
    return own or store(port[0], is_master=False)
