"""``maestri eval``: judges what a run has learnt."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnArguments:
    """k-NN accuracy of a run's student and teachers, beside raw pixels and the untrained network.

    Pooling and k are chosen on held-out training images, then test images are classified.  The result is printed and
    written to RUN/knn.json.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, as train.py leaves it."""
    shards: str = ""
    """Training shards, if they have moved since."""
    test_shards: str = ""
    """Test shards, if they have moved since or the run had none."""
    k: tuple[int, ...] = ()
    """Numbers of neighbours; the run's own by default."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where features are computed."""
    json: bool = False
    """Print JSON instead of a table."""


def run(argv: list[str]) -> int:
    """Runs ``maestri eval`` and returns its exit code."""
    app = tyro.extras.SubcommandApp()
    app.command(name="knn")(knn)
    return int(app.cli(prog="maestri eval", args=argv, use_underscores=False) or 0)


def knn(arguments: Annotated[KnnArguments, tyro.conf.arg(name="")]) -> int:
    """k-NN accuracy of a run's student and teachers."""
    from maestri.engine.config_files import read_config
    from maestri.engine.distributed import prepare_environment, quiet_libraries
    from maestri.engine.errors import RunError
    from maestri.pipelines.reader import TooManyBadSamples

    flags = []
    for name, value in (("data.shards", arguments.shards), ("data.test_shards", arguments.test_shards)):
        flags += [f"--{name}", value] * bool(value)
    if arguments.k:
        flags += ["--evaluation.k", *map(str, arguments.k)]
    try:
        config = read_config(arguments.run, flags)
        device = prepare_environment(arguments.device)
        quiet_libraries()
        _judge(config, arguments, device)
    except (ValueError, RunError, OSError, TooManyBadSamples) as error:
        print(f"maestri eval: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _judge(config: object, arguments: KnnArguments, device: object) -> None:
    """Judges the run, prints the result and writes it beside the run."""
    import torch
    from rich.console import Console

    from maestri.engine.config import RunConfig
    from maestri.evals.report import summary, table
    from maestri.evals.run import can_judge, judge_run
    from maestri.shards.files import write_atomically

    assert isinstance(config, RunConfig) and isinstance(device, torch.device)
    if not can_judge(config, final=True):
        raise ValueError("there is nothing to classify: the run has no data.holdout; give --test-shards")
    report, checkpoint = judge_run(config, arguments.run, device)
    result = {"checkpoint": checkpoint.name, **summary(report)}
    text = json.dumps(result, indent=2) + "\n"
    write_atomically(arguments.run / "knn.json", text.encode())
    if arguments.json:
        print(text, end="")
    else:
        Console().print(table(report))
