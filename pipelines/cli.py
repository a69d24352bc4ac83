"""``maestri pipelines``: look at what the data path makes of a data set, and how fast."""

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from maestri.pipelines import bench as benching
from maestri.pipelines.ahead import LoaderStuck
from maestri.pipelines.config import DataConfig
from maestri.pipelines.loader import Loader
from maestri.pipelines.reader import TooManyBadSamples
from maestri.pipelines.show import save_views_picture
from maestri.pipelines.views import ViewsConfig
from maestri.shards.errors import ShardError
from maestri.shards.shard_set import ShardSet

app = tyro.extras.SubcommandApp()
_DATA, _VIEWS = DataConfig(shards=""), ViewsConfig()


@app.command
def show(
    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")],
    /,
    out: Path = Path("views.png"),
    patch: int = 16,
    samples: int = 8,
    seed: int = 0,
    position: int = 0,
    views: Annotated[ViewsConfig, tyro.conf.arg(help="What the views are.")] = _VIEWS,
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


@app.command
def bench(
    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")],
    /,
    batch: int = 128,
    batches: int = 16,
    rounds: int = 5,
    patch: int = 16,
    device: str = "",
    tune: bool = False,
    limit: bool = True,
    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False,
    data: Annotated[DataConfig, tyro.conf.arg(help="How samples are read.")] = _DATA,
    views: Annotated[ViewsConfig, tyro.conf.arg(help="What the views are.")] = _VIEWS,
) -> None:
    """Measure the loader alone: images/s, MB/s, where the time goes, and how far it is from decoding alone.

    Rounds take turns with decoding alone (libjpeg-turbo, as many threads, bytes in memory).  --tune tries threads,
    prefetch, readers and, on a GPU, the hardware decoder's share, and prints the best as lines for a recipe.

    Args:
        shards: Folder of shards.
        batch: Samples per batch.
        batches: Batches per round.
        rounds: Rounds, of which the median counts.
        patch: Side of a token in pixels.
        device: cpu or cuda; a GPU if there is one.
        tune: Try settings, and print the best.
        limit: Measure decoding alone, too.
        as_json: Print everything as JSON.
        data: How samples are read.
        views: What the views are.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for name, value in (("batch", batch), ("batches", batches), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"--{name} is {value}; expected at least 1")
    with ShardSet.open(shards) as shard_set, Progress(transient=True, disable=as_json, console=_stderr()) as progress:

        def measure(config: DataConfig) -> benching.Bench:
            task = progress.add_task("measuring", total=rounds * batches)
            found = benching.measure(
                shard_set,
                config=config,
                views=views,
                patch=patch,
                batch_size=batch + batch % 2,
                device=where,
                batches=batches,
                rounds=rounds,
                with_limit=limit and where.type == "cpu" and not tune,
                on_batch=lambda: progress.advance(task),
            )
            progress.remove_task(task)
            return found

        best, tried = benching.tune(data, where, measure) if tune else (data, [])
        result = measure(best)
    if as_json:
        trials = [{"setting": name, "value": value, **trial.as_json()} for name, value, trial in tried]
        _print_json({"result": result.as_json(), "tried": trials})
    else:
        _print_bench(result, tried, best)


def _print_bench(result: benching.Bench, tried: list[tuple[str, object, benching.Bench]], best: DataConfig) -> None:
    """Prints what was measured for people."""
    console = Console()
    if tried:
        table = Table("setting", "value", "images/s", title="tried, one setting after the other")
        for name, value, trial in tried:
            table.add_row(f"data.{name}", str(value), f"{trial.images_per_second:,.0f}")
        console.print(table)
    table = Table("", "", title=f"{result.executor}, {result.num_threads} threads: the loader alone", show_header=False)
    table.add_row("images/s", f"{result.images_per_second:,.0f}")
    if result.decode_limit:
        share = result.images_per_second / result.decode_limit
        table.add_row("of decoding alone", f"{share:.0%} ({result.decode_limit:,.0f} images/s)")
    table.add_row("MB/s from shards", f"{result.megabytes_per_second:,.1f}")
    table.add_row("images/s per core in use", f"{result.images_per_core_second:,.0f}")
    table.add_row("batch to batch, ms", "  ".join(f"{name} {ms:.1f}" for name, ms in result.batch_ms.items()))
    table.add_row("memory of a batch, MB", f"{result.batch_bytes / 1e6:,.1f}")
    console.print(table)
    stages = Table("stage", "µs an image", title="summed over threads, waiting included")
    for name, microseconds in result.stage_us.items():
        stages.add_row(name, f"{microseconds:,.1f}")
    console.print(stages)
    if tried:
        tuned = [(name, getattr(best, name)) for name in dict.fromkeys(name for name, _, _ in tried)]
        console.print("data:", *(f"{name}: {value}" for name, value in tuned), sep="\n  ")


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def _stderr() -> Console:
    return Console(stderr=True)


def run(argv: list[str]) -> int:
    """Runs ``maestri pipelines`` with these arguments; returns the exit status."""
    try:
        app.cli(prog="maestri pipelines", args=argv)
    except (ValueError, OSError, TooManyBadSamples, ShardError, LoaderStuck) as error:
        print(f"maestri pipelines: {error}", file=sys.stderr)
        return 1
    return 0
