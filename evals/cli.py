"""``maestri eval``: judges what a run has learnt; on several ranks ``torchrun … -m maestri.evals.cli``."""

import logging
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import tyro
from rich.console import Console

from maestri.engine.config import as_plain
from maestri.engine.distributed import environment_rank, leave, one_line, prepare_environment, quiet_libraries
from maestri.evals.arguments import Arguments, KnnFlags
from maestri.evals.cache import FeatureCache, cached_features
from maestri.evals.clustering import ClusterSettings
from maestri.evals.features import ImageSettings
from maestri.evals.judging import (
    Judgement,
    Protocol,
    Settings,
    check_settings,
    judge_features,
    overview,
    write_judgement,
)
from maestri.evals.knn import KnnSettings
from maestri.evals.linear import LinearSettings
from maestri.evals.lowshot import LowshotSettings
from maestri.evals.protocol import FeatureSets
from maestri.evals.sets import Splits, read_features, read_labels
from maestri.evals.sharing import FAILURES, agreeing
from maestri.evals.sources import Source, open_source
from maestri.shards.shard_set import ShardSet

MOST_HELD_OUT = 10_000
"""Images held out at most where nobody says how many; else a tenth of the training images."""


Inline = tyro.conf.arg(name="")
Common = Annotated[Arguments, Inline]
DEFAULT_KNN, DEFAULT_LINEAR = KnnFlags(), LinearSettings()
DEFAULT_LOWSHOT, DEFAULT_CLUSTER = LowshotSettings(), ClusterSettings()


def knn(common: Common, flags: Annotated[KnnFlags, Inline] = DEFAULT_KNN) -> None:
    """Weighted k-NN accuracy, cosine similarity."""
    _judge(common, {"knn": flags})


def linear(common: Common, flags: Annotated[LinearSettings, Inline] = DEFAULT_LINEAR) -> None:
    """Accuracy of linear probes, many learning rates at once."""
    _judge(common, {"linear": flags})


def lowshot(common: Common, flags: Annotated[LowshotSettings, Inline] = DEFAULT_LOWSHOT) -> None:
    """Accuracy of logistic regression on few labelled images."""
    _judge(common, {"lowshot": flags})


def cluster(common: Common, flags: Annotated[ClusterSettings, Inline] = DEFAULT_CLUSTER) -> None:
    """How well k-means clusters agree with classes."""
    _judge(common, {"cluster": flags})


def all_protocols(
    common: Common,
    knn: Annotated[KnnFlags, Inline] = DEFAULT_KNN,
    linear: Annotated[LinearSettings, Inline] = DEFAULT_LINEAR,
    lowshot: Annotated[LowshotSettings, Inline] = DEFAULT_LOWSHOT,
    cluster: Annotated[ClusterSettings, Inline] = DEFAULT_CLUSTER,
) -> None:
    """All of them, on features computed once."""
    _judge(common, {"knn": knn, "linear": linear, "lowshot": lowshot, "cluster": cluster})


COMMANDS: dict[str, Callable[..., None]] = {
    "knn": knn,
    "linear": linear,
    "lowshot": lowshot,
    "cluster": cluster,
    "all": all_protocols,
}


def run(argv: list[str]) -> int:
    """Runs ``maestri eval`` and returns its exit code: 0, 1 after an error, 2 after wrong usage."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    rank = environment_rank()
    logging.basicConfig(format="maestri eval: %(message)s", stream=sys.stderr)
    logging.getLogger("maestri.evals").setLevel(logging.ERROR if rank else logging.INFO)
    app = tyro.extras.SubcommandApp()
    for name, command in COMMANDS.items():
        app.command(name=name)(command)
    code = 0
    try:
        app.cli(prog="maestri eval", args=argv, use_underscores=False)
    except FAILURES as error:
        code = 1
        if rank == 0:
            print(f"maestri eval: {one_line(error)}", file=sys.stderr)
    if several:
        leave(code, orderly=True)
    return code


def _judge(arguments: Arguments, wanted: Mapping[Protocol, Settings | KnnFlags]) -> None:
    """Judges the source by the wanted protocols; rank 0 prints and writes."""
    device = prepare_environment(arguments.device)
    quiet_libraries()
    if int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    with agreeing():
        source = open_source(arguments.source, device, timm_name=arguments.timm, size=arguments.size)
        splits = _splits(arguments, source)
        settings_of = {name: _settings(settings, source) for name, settings in wanted.items()}
    images = ImageSettings(
        size=source.size,
        crop_fraction=arguments.crop_fraction or source.crop_fraction,
        batch_size=arguments.batch_size or source.batch_size,
        num_threads=source.num_threads,
        device=device,
        executor=source.executor,
    )
    cache = FeatureCache(arguments.features or source.home / "features") if arguments.cache else None
    labelled = read_labels(splits, device=device)
    with agreeing():
        for settings in settings_of.values():
            check_settings(settings, labelled, shards=splits.shards, seed=arguments.seed)
    read = partial(cached_features, source.models, settings=images, cache=cache)
    sets = read_features(labelled, splits, read)
    about = _about(arguments, source, splits, images, sets)
    found = []
    for protocol, settings in settings_of.items():
        found.append(judge_features(protocol, settings, sets, shards=splits.shards, seed=arguments.seed))
        with agreeing():
            if environment_rank() == 0:
                _give(arguments, source, found[-1], {**about, "settings": as_plain(settings)})
    if environment_rank() == 0 and len(found) > 1 and not arguments.json:
        Console().print(overview(found).as_table())


def _give(arguments: Arguments, source: Source, judgement: Judgement, about: Mapping[str, Any]) -> None:
    """Writes what a protocol found, and prints it."""
    folder = arguments.out or source.results
    text = write_judgement(folder, judgement, about)
    if arguments.json:
        print(text, end="")
        return
    console = Console()
    console.print()
    console.print(judgement.sheet.as_table())
    console.print(f"{folder}/{judgement.protocol}.json and .md", style="dim", highlight=False, soft_wrap=True)


def _splits(arguments: Arguments, source: Source) -> Splits:
    """Returns which images are judged.

    Raises:
        ValueError: nobody names training shards.
    """
    shards = arguments.train_shards or arguments.shards or source.shards
    if not shards:
        raise ValueError(f"{source.name} names no images; give training shards: SOURCE SHARDS [--test-shards FOLDER]")
    test_shards = arguments.test_shards or source.test_shards
    holdout = source.holdout if arguments.holdout is None else arguments.holdout
    if holdout is None:
        with ShardSet.open(shards) as shard_set:
            holdout = min(MOST_HELD_OUT, len(shard_set) // 10)
    return Splits(shards=Path(shards), holdout=holdout, test_shards=Path(test_shards) if test_shards else None)


def _settings(settings: Settings | KnnFlags, source: Source) -> Settings:
    if isinstance(settings, KnnFlags):
        return KnnSettings(k=settings.k or source.k, temperature=source.temperature)
    return settings


def _about(
    arguments: Arguments, source: Source, splits: Splits, images: ImageSettings, sets: FeatureSets
) -> dict[str, Any]:
    """Returns what was judged, on what and how, for the results' files."""
    return {
        "checkpoint": source.name,
        "shards": str(splits.shards),
        "test_shards": str(splits.test_shards or ""),
        "images": {
            "train": len(sets.train.labels) - sets.num_held_out,
            "held-out": sets.num_held_out,
            "test": len(sets.test.labels) if sets.test else 0,
        },
        "pixels": {"size": images.size, "crop_fraction": images.crop_fraction},
        "seed": arguments.seed,
    }


if __name__ == "__main__":  # torchrun --nproc-per-node N -m maestri.evals.cli PROTOCOL RUN
    sys.exit(run(sys.argv[1:]))
