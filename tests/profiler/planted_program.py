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
from maestri.model.encoder import Encoder
from maestri.model.plmae import Plmae
from maestri.pipelines import pixel_ops
from maestri.pipelines.pixel_ops import PixelOps
from maestri.profiler import measure, trial
from maestri.profiler.findings import Profile
from maestri.profiler.measure import Plan, measure_profile, new_collection
from maestri.profiler.peak import measure_peak
from maestri.shards.shard_set import ShardSet

KEPT: list[bytearray] = []
ROUNDS = {"wait": 1, "deep": 2, "sleep": 1, "page cache": 2, "leak": 2, "rank": 1}
"""Where fewer than three will do."""
STALLS = ("store", "decode", "augment")
"""Whose cause is looked at."""
MOST_ROUNDS, MOST_NOISE = 12, 0.3
"""For them: more rounds, up to so many, where rounds differ by more; a stall smaller than that has no cause."""
STALL = 0.016
"""Seconds that an image is held up for them: a batch takes several times as long as the step, which other programs may
slow down, and a sleep not."""
READ: set[int] = set()
"""Rows in the page cache of a planted disk."""


def slowed(owner: Any, name: str, seconds: Callable[..., float]) -> Callable[..., Any]:
    """Returns a method that first sleeps, and after which nothing else changes."""
    original = getattr(owner, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(seconds(*arguments))
        return original(*arguments, **keywords)

    return call


def uncached_delay(shards: ShardSet, rows: Any) -> float:
    """Returns seconds for a disk that answers late, for rows that were not read since the page cache was dropped."""
    fresh = set(map(int, rows)) - READ
    READ.update(fresh)
    return STALL * len(fresh)


def twice_as_deep(encoder: Encoder, *arguments: Any) -> Any:
    """Runs a teacher's blocks twice; the student's, which has gradients, once."""
    blocks = encoder.blocks
    if not next(encoder.parameters()).requires_grad:
        encoder.blocks = torch.nn.Sequential(*blocks, *blocks)
    try:
        return ENCODE(encoder, *arguments)
    finally:
        encoder.blocks = blocks


def asking(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a loss that asks for a value of each of its inputs, as a print of a norm would."""

    def call(method: Plmae, outputs: Any, targets: Any, step: int) -> Any:
        for tensor in outputs.values():
            float(tensor.detach().float().norm())
        return loss(method, outputs, targets, step)

    return call


ENCODE = Encoder.forward


@contextmanager
def planted(case: str, rank: int) -> Iterator[None]:
    """Plants a fault inside the block."""
    replaced: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "deep": (Encoder, "forward", twice_as_deep),
        "wait": (Plmae, "loss", asking(Plmae.loss)),
    }
    places: dict[str, tuple[Any, str, Callable[..., float]]] = {
        "store": (ShardSet, "read_checked", lambda shards, rows: STALL * len(rows)),
        "page cache": (ShardSet, "read_checked", uncached_delay),
        "decode": (pixel_ops.simplejpeg, "decode_jpeg", lambda *_: STALL),
        "augment": (PixelOps, "_resize", lambda *_: STALL / 2),  # both views
        "sleep": (Plmae, "loss", lambda *_: 0.03),
        "rank": (Plmae, "targets", lambda *_: 0.05 if rank == 1 else 0.0),
        "leak": (Plmae, "loss", lambda *_: KEPT.append(bytearray(b"x") * 3_000_000) or 0.0),
    }
    if case in places:
        owner, name, seconds = places[case]
        changed = slowed(owner, name, seconds)
    elif case in replaced:
        owner, name, changed = replaced[case]
    else:
        yield
        return
    original = getattr(owner, name)
    setattr(owner, name, changed)
    try:
        yield
    finally:
        setattr(owner, name, original)


def profiled(folder: Path, case: str, ranks: distributed.Ranks, *, rounds: int) -> Profile:
    """Returns the profile of the recipe with a fault planted."""
    config = load_config(folder / "tiny.yaml", ["--out", "nowhere"])
    collected = new_collection(config, ranks, recipe=case)
    plan = Plan(
        steps=3,
        rounds=rounds,
        cold=case in ("healthy", "page cache"),
        experiments=case == "decode",
    )
    with planted(case, ranks.rank):
        measure_profile(config, ranks, plan, collected, folder=folder / f"run {case}", on_step=lambda: None)
    return collected.profile(complete=True)


def main(folder: Path, cases: list[str]) -> None:
    """Profiles each case."""
    torch.set_num_threads(1)
    device = distributed.prepare_environment("cpu")
    ranks = distributed.start(device, timeout_minutes=2)
    peak = measure_peak(device, torch.float32, repeats=3, stream_bytes=2**24)
    measure.measure_peak = lambda *_: peak
    trial.drop_from_page_cache = lambda _: READ.clear()
    for case in cases:
        rounds = ROUNDS.get(case, 3)
        found = profiled(folder, case, ranks, rounds=rounds)
        while case in STALLS and found.noise > MOST_NOISE and rounds < MOST_ROUNDS:
            rounds *= 2
            found = profiled(folder, case, ranks, rounds=rounds)
        if ranks.is_main:
            (folder / f"{case} {ranks.world_size}.json").write_text(json.dumps(found.as_json()))
    distributed.leave(0, orderly=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
