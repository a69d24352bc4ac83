"""Run by test_profile.py: profiles a tiny recipe with one fault planted after the other; writes a profile for each.

Usage: planted_program.py FOLDER CASE …; FOLDER holds shards and ``tiny.yaml``.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from maestri.engine import distributed
from maestri.engine.config_files import load_config
from maestri.model.plmae import Plmae
from maestri.pipelines import pixel_ops
from maestri.pipelines.pixel_ops import PixelOps
from maestri.profiler import measure
from maestri.profiler.measure import Plan, measure_profile, new_collection
from maestri.profiler.peak import measure_peak
from maestri.shards.shard_set import ShardSet

KEPT: list[bytearray] = []


def slowed(owner: Any, name: str, seconds: Callable[..., float]) -> Callable[..., Any]:
    """Returns a method that first sleeps, and after which nothing else changes."""
    original = getattr(owner, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(seconds(*arguments))
        return original(*arguments, **keywords)

    return call


@contextmanager
def planted(case: str, rank: int) -> Iterator[None]:
    """Plants a fault inside the block."""
    places: dict[str, tuple[Any, str, Callable[..., float]]] = {
        "store": (ShardSet, "read_checked", lambda shards, rows: 0.005 * len(rows)),
        "decode": (pixel_ops.simplejpeg, "decode_jpeg", lambda *_: 0.008),
        "augment": (PixelOps, "_resize", lambda *_: 0.004),
        "sleep": (Plmae, "loss", lambda *_: 0.03),
        "rank": (Plmae, "targets", lambda *_: 0.05 if rank == 1 else 0.0),
        "leak": (Plmae, "loss", lambda *_: KEPT.append(bytearray(b"x") * 3_000_000) or 0.0),
    }
    if case not in places:
        yield
        return
    owner, name, seconds = places[case]
    original = getattr(owner, name)
    setattr(owner, name, slowed(owner, name, seconds))
    try:
        yield
    finally:
        setattr(owner, name, original)


def main(folder: Path, cases: list[str]) -> None:
    """Profiles each case."""
    torch.set_num_threads(1)
    device = distributed.prepare_environment("cpu")
    ranks = distributed.start(device, timeout_minutes=2)
    peak = measure_peak(device, torch.float32, repeats=3, stream_bytes=2**24)
    measure.measure_peak = lambda *_: peak
    for case in cases:
        config = load_config(folder / "tiny.yaml", ["--out", "nowhere"])
        found = new_collection(config, ranks, recipe=case)
        with planted(case, ranks.rank):
            plan = Plan(
                steps=3,
                rounds=3 if case in ("leak", "rank") else 4,
                cold=case == "healthy",
                experiments=case == "decode",
            )
            measure_profile(config, ranks, plan, found, folder=folder / f"run {case}", on_step=lambda: None)
        if ranks.is_main:
            path = folder / f"{case} {ranks.world_size}.json"
            path.write_text(json.dumps(found.profile(complete=True).as_json()))
    distributed.leave(0, orderly=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
