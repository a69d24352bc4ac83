"""Where the ranks of one start meet, apart from what earlier starts have left in the launcher's store."""

import hashlib
import json
import secrets
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

PAUSE = 0.05
"""Seconds between two looks."""


def join(backend: str, timeout: timedelta) -> None:
    """Makes the default process group of all ranks that the environment names.

    torchrun (PyTorch 2.15) keeps one store over all its restarts, in which a rank may find the address of a dead one
    and wait for it for ever.  So the ranks first agree on a name that no earlier start has used.

    Raises:
        ConnectionError: not all ranks came in time.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    if world_size > 1:
        name = agreed_name(store, rank=rank, world_size=world_size, timeout=timeout)
        store = dist.PrefixStore(name, store)  # type: ignore[attr-defined]  # torch does not list it
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def agreed_name(store: Any, *, rank: int, world_size: int, timeout: timedelta) -> str:
    """Returns a name that the live ranks share, and no earlier ones that left their words in the store.

    Rank 0 offers a list of one word a rank; a rank agrees where its own word stands in it; when all have, it holds.

    Raises:
        ConnectionError: not all ranks came in time.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    word = secrets.token_hex(8)
    store.set(f"maestri/word/{rank}", word)
    while time.monotonic() < deadline:
        if rank == 0:
            store.wait([f"maestri/word/{other}" for other in range(world_size)], timeout)
            words = [store.get(f"maestri/word/{other}").decode() for other in range(world_size)]
            store.set("maestri/offer", json.dumps(words))
        else:
            words = json.loads(store.get("maestri/offer"))
        if words[rank] == word:
            name = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]
            store.set(f"maestri/agrees/{rank}/{name}", "")
            if store.check([f"maestri/agrees/{other}/{name}" for other in range(world_size)]):
                return name
        time.sleep(PAUSE)
    raise ConnectionError(f"not all {world_size} ranks came within {timeout.total_seconds() / 60:g} minutes")
