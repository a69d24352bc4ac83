"""``maestri pipelines``: look at what the data path makes of a data set."""

import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro

from maestri.pipelines.config import DataConfig
from maestri.pipelines.loader import Loader
from maestri.pipelines.reader import TooManyBadSamples
from maestri.pipelines.show import save_views_picture
from maestri.pipelines.views import ViewsConfig
from maestri.shards.shard_set import ShardSet

app = tyro.extras.SubcommandApp()


@app.command
def show(
    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")],
    /,
    out: Path = Path("views.png"),
    patch: int = 16,
    samples: int = 8,
    seed: int = 0,
    position: int = 0,
    views: Annotated[ViewsConfig, tyro.conf.arg(help="What the views are.")] = ViewsConfig(),  # noqa: B008
) -> None:
    """Write a PNG of real views and masks, as the model sees them.

    Args:
        shards: Folder of shards.
        out: The PNG.
        patch: Side of a token in pixels.
        samples: Samples in the picture.
        seed: Of order, views and masks.
        position: Global position of the first sample.
        views: What the views are.
    """
    global_size = samples + samples % 2
    with (
        ShardSet.open(shards) as shard_set,
        Loader(
            shard_set,
            config=DataConfig(shards=shards, prefetch=1),
            views=views,
            patch=patch,
            seed=seed,
            rank=0,
            world_size=1,
            global_size=global_size,
            device=torch.device("cpu"),
        ) as loader,
    ):
        loader.load_state_dict(loader.state_dict() | {"position": position // global_size * global_size})
        save_views_picture(next(loader), out, num_samples=samples)
    print(out)


def run(argv: list[str]) -> int:
    """Runs ``maestri pipelines`` with these arguments; returns the exit status."""
    try:
        app.cli(prog="maestri pipelines", args=argv)
    except (ValueError, OSError, TooManyBadSamples) as error:
        print(f"maestri pipelines: {error}", file=sys.stderr)
        return 1
    return 0
