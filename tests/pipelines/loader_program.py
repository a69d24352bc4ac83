"""A process that reads batches and writes what they hold: ranks of a run that a test kills, moves and watches.

    python loader_program.py SHARDS EXECUTOR JOB …

A job is OUT:RANK:WORLD:POSITION:STEPS; jobs are done one after the other.  Per sample it appends a line to OUT: global
position, row, label, and hashes of the views and masks.  STEPS may be a word for what follows one batch: "wait" (it
says "waiting" and does, for ever), "raise" (it raises) or "leave" (it ends without closing the loader).
"""

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch
import xxhash

from maestri.pipelines.batch import Batch
from maestri.pipelines.colour import ColourConfig
from maestri.pipelines.config import DataConfig
from maestri.pipelines.corruption import CorruptionConfig
from maestri.pipelines.filters import BlurConfig
from maestri.pipelines.loader import Loader
from maestri.pipelines.order import OrderConfig
from maestri.pipelines.views import LocalConfig, ViewsConfig
from maestri.shards.shard_set import ShardSet

GLOBAL_SIZE = 48
"""Divides into even slices for 1, 2, 3, 4 and 8 ranks."""
VIEWS = ViewsConfig(
    size=32,
    colour=ColourConfig(brightness=0.4, saturation=0.2, hue=0.1, grey=0.2),
    blur=BlurConfig(probability=(1.0, 0.1)),
    solarise=(0.0, 0.2),
    corruption=CorruptionConfig(coverage=0.5, noise=0.2),
    local=LocalConfig(count=2, size=16),
)


def samples_of(batch: Batch) -> list[dict[str, object]]:
    """Returns for each sample of a batch its position, row and a hash of each of its tensors."""
    groups = {f"views.{name}": tensor for name, tensor in batch.views.items()}
    groups |= {f"mask.{name}": tensor for name, tensor in batch.token_mask.items()}
    return [
        {"position": batch.position + at, "row": int(batch.rows[at]), "label": int(batch.labels[at])}
        | {
            name: xxhash.xxh64_hexdigest(tensor[:, at].contiguous().numpy().tobytes())
            for name, tensor in groups.items()
        }
        for at in range(len(batch.rows))
    ]


def main() -> None:
    """Does the jobs."""
    shards, executor, *jobs = sys.argv[1:]
    torch.set_num_threads(1)
    for job in jobs:
        out, rank, world, position, steps = job.split(":")
        with ExitStack() as stack:
            file = stack.enter_context(Path(out).open("a"))
            shard_set = stack.enter_context(ShardSet.open(shards))
            loader = stack.enter_context(
                Loader(
                    shard_set,
                    config=DataConfig(shards=shards, executor=executor, order=OrderConfig(kind="windowed", window=2)),
                    views=VIEWS,
                    patch=8,
                    seed=9,
                    rank=int(rank),
                    world_size=int(world),
                    global_size=GLOBAL_SIZE,
                    device=torch.device("cpu"),
                )
            )
            loader.load_state_dict(loader.state_dict() | {"position": int(position)})
            for _ in range(int(steps) if steps.isdigit() else 1):
                file.writelines(json.dumps(sample) + "\n" for sample in samples_of(next(loader)))
                file.flush()
            if steps == "raise":
                raise RuntimeError("in the loop")
            if steps == "leave":
                stack.pop_all()  # nothing is closed
            while steps == "wait":
                print("waiting", flush=True)
                time.sleep(0.05)


if __name__ == "__main__":
    main()
