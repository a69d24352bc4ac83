"""From a configuration to the parts of a run: loader, method, engine, teachers."""

from pathlib import Path

from maestri.engine import checkpoint, distributed
from maestri.engine.config import RunConfig
from maestri.engine.continuation import Parts
from maestri.engine.distributed import Ranks
from maestri.engine.finite import FiniteGuard
from maestri.engine.initial import load_initial
from maestri.engine.logs import Meter
from maestri.engine.start import start_engine
from maestri.model.build import build_method
from maestri.model.method import Method
from maestri.pipelines.loader import Loader
from maestri.shards.shard_set import ShardSet


def build_loader(config: RunConfig, shard_set: ShardSet, ranks: Ranks) -> Loader:
    """Returns the training loader of this rank: one batch of it is one micro-batch."""
    return Loader(
        shard_set,
        config=config.data,
        views=config.views,
        patch=config.encoder.patch,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        global_size=config.batch.micro_size,
        device=ranks.device,
    )


def build_student(config: RunConfig) -> tuple[Method, str]:
    """Returns the method, and what to tell of weights that came from another run."""
    method = build_method(
        config.method, config.encoder, image_size=config.views.size, num_steps=config.steps, seed=config.seed
    )
    goes_on = config.resume == "auto" and checkpoint.latest(Path(config.out)) is not None
    return method, "" if goes_on else load_initial(method, config.initial)


def build_parts(config: RunConfig, method: Method, shard_set: ShardSet, loader: Loader, ranks: Ranks) -> Parts:
    """Returns the student in its engine, its teachers, and all else that a checkpoint holds."""
    # Weights are the same on all ranks, drawn before; what is drawn while training (drop-path) is not.
    distributed.seed_everything(config.seed + 1 + ranks.rank)
    engine, teachers, masters = start_engine(
        method, ranks, batch=config.batch, optimizer=config.optimizer, engine=config.engine
    )
    return Parts(
        engine=engine,
        method=method,
        teachers=teachers,
        masters=masters,
        loader=loader,
        meter=Meter(ranks.device),
        guard=FiniteGuard(
            ranks,
            folder=Path(config.out) / "skipped",
            budget=config.engine.max_skipped,
            check_gradients=config.engine.check_gradients,
            keys_of=lambda rows: [shard_set.key(row) for row in rows],
        ),
        ranks=ranks,
        control=distributed.control_group(),
    )
