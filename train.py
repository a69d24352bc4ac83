"""Trains a masked image model with its teachers: ``python train.py CONFIG [--section.field VALUE …]``.

One process needs no launcher; several are started by ``torchrun --nproc-per-node N train.py CONFIG …`` or
``deepspeed --no_local_rank train.py CONFIG …``.  The same command continues a run that was stopped or killed.

Exit codes: 0 the run is complete; 2 the configuration is wrong; 1 the run failed, with one line that says why;
75 stopped by SIGTERM or SIGINT after writing a checkpoint.
"""

import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import torch

from maestri.engine import checkpoint, distributed
from maestri.engine.checkpoint import Parts
from maestri.engine.config import OptimizerConfig, RunConfig, as_plain
from maestri.engine.config_files import load_config, save_config
from maestri.engine.display import Display
from maestri.engine.distributed import Ranks
from maestri.engine.errors import RunError
from maestri.engine.logs import Meter, RunLog, read_rows, write_summary
from maestri.engine.schedules import scaled_lr, span_of, warmup_cosine
from maestri.engine.spans import SpanRecorder, recording
from maestri.engine.start import check_slices, start_engine
from maestri.engine.step import set_learning_rate, train_step
from maestri.engine.stop import EXIT_STOPPED, StopRequest
from maestri.evals.protocol import KnnReport
from maestri.evals.report import figures as knn_figures
from maestri.evals.report import plot_run
from maestri.evals.report import summary as knn_summary
from maestri.evals.report import table as knn_table
from maestri.evals.run import can_judge, check_images, judge, live_encoders
from maestri.model.build import build_method
from maestri.model.method import Method
from maestri.pipelines.ahead import LoaderStuck
from maestri.pipelines.batch import Batch
from maestri.pipelines.loader import Loader
from maestri.pipelines.reader import TooManyBadSamples
from maestri.pipelines.show import save_views_picture
from maestri.shards.shard_set import ShardSet

EXIT_FAILED = 1
EXIT_USAGE = 2


# ------------------------------------------------------------------------------------------------------- building


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


def build_parts(config: RunConfig, loader: Loader, ranks: Ranks) -> Parts:
    """Returns the student in its engine, its teachers, and all else that a checkpoint holds."""
    method = build_method(
        config.method, config.encoder, image_size=config.views.size, num_steps=config.steps, seed=config.seed
    )
    # Weights are the same on all ranks, drawn above; what is drawn while training (drop-path) is not.
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
        ranks=ranks,
        control=distributed.control_group(),
    )


def start_or_resume(config: RunConfig, parts: Parts) -> int:
    """Returns the optimizer steps already done: those of the run found in ``config.out``, else 0."""
    out = Path(config.out)
    if config.resume == "never" and parts.ranks.is_main:
        checkpoint.discard(out)
    distributed.wait_for_all()
    found = checkpoint.latest(out)
    return checkpoint.resume(found, parts, config=as_plain(config)) if found else 0


def learning_rate(config: OptimizerConfig, step: int, *, num_steps: int, global_size: int) -> float:
    """Returns the learning rate of a 0-based optimizer step."""
    return warmup_cosine(
        step,
        num_steps=num_steps,
        warmup=span_of(config.warmup, num_steps),
        peak=scaled_lr(config.base_lr, global_size),
        end=config.min_lr,
    )


def with_picture(batches: Iterator[Batch], path: Path | None) -> Iterator[Batch]:
    """Yields ``batches``, after drawing the views and masks of the first one."""
    if path is not None:
        first = next(batches)
        save_views_picture(first, path)
        yield first
    yield from batches


# ------------------------------------------------------------------------------------------------------- training


def evaluate_run(config: RunConfig, parts: Parts, step: int) -> KnnReport | None:
    """Returns k-NN accuracies after ``step`` optimizer steps, None without images to classify; every rank calls it."""
    final = step == config.steps
    if not can_judge(config, final=final):
        return None
    return judge(config, live_encoders(parts.method, parts.engine.module), parts.ranks.device, final=final)


def finish_run(out: Path, config: RunConfig, report: KnnReport | None, display: Display) -> None:
    """Leaves ``summary.json`` and the plot of a complete run, and shows the final accuracies."""
    knn = knn_summary(report) if report else {}
    write_summary(out, {"images": config.steps * config.batch.global_size, "knn": knn})
    plot_run(read_rows(out / "metrics.jsonl"), out / "curves.png")
    if report:
        display.show(knn_table(report))


def teacher_momenta(method: Method, step: int) -> dict[str, float]:
    """Returns the momentum of each teacher at a 0-based optimizer step."""
    return {f"momentum_{role}": teacher.momentum(step) for role, teacher in method.teachers.items()}


def is_due(step: int, every: int) -> bool:
    """Returns whether something that happens ``every`` steps (0 = never) happens after ``step`` steps."""
    return every > 0 and step % every == 0


def train(config: RunConfig, parts: Parts, shard_set: ShardSet, loader: Loader, first_step: int) -> bool:
    """Trains to the end or until asked to stop; returns whether the run is complete."""
    out, ranks, meter, method = Path(config.out), parts.ranks, parts.meter, parts.method
    log = RunLog(out, first_step=first_step, tensorboard=config.logging.tensorboard) if ranks.is_main else None
    title = f"{config.method.name} on {ranks.world_size} × {ranks.device.type}"
    display = Display(title=title, steps=config.steps, first_step=first_step, enabled=ranks.is_main)
    stop = StopRequest(parts.control, ranks.world_size)
    spans = SpanRecorder(ranks.device)
    batches = with_picture(loader, out / "views.png" if ranks.is_main and not first_step else None)
    step, stopping, waited, report = first_step, False, 0.0, None

    with display, recording(spans):
        if first_step:
            display.note(f"continuing {out} after step {first_step}")
        while True:
            # Evaluate before the first step, after the last and in between; off the clock, as checkpoints are.
            if step in (0, config.steps) or is_due(step, config.evaluation.every):
                report = evaluate_run(config, parts, step)
                if log is not None and report is not None:
                    log.write("evaluation", step, knn_figures(report))
            if step == config.steps:
                break

            # One optimizer step: load, teachers, student, loss, backward, step, averages.
            meter.go_on()
            # The first row is the untrained network's: monitors of collapse are read against it.
            is_logged = step == 0 or is_due(step + 1, config.logging.every) or step + 1 == config.steps
            rate = learning_rate(config.optimizer, step, num_steps=config.steps, global_size=config.batch.global_size)
            set_learning_rate(parts.engine, rate)
            result = train_step(parts.engine, method, parts.teachers, batches, step, monitor=is_logged)
            meter.add(result.metrics, num_images=config.batch.global_size)
            step += 1
            display.advance(step)
            stopping = stop.agreed()

            # Log: here the loop waits for the device and for other ranks.
            if is_logged:
                row = meter.take(step=step, wait_seconds=loader.wait_seconds - waited, bad_samples=loader.num_bad)
                waited = loader.wait_seconds
                row |= {"learning_rate": rate, **teacher_momenta(method, step - 1)}
                row |= {f"seconds/{name}": seconds for name, seconds in spans.take().items()}
                if log is not None:
                    log.write("train", step, row)
                display.update(step, row)
            meter.pause()

            # Checkpoint.
            if is_due(step, config.checkpoint.every) or step == config.steps or stopping:
                meter.check_finite(step)
                if log is not None:
                    log.sync()
                checkpoint.save(out, parts, step=step, config=as_plain(config), keep=config.checkpoint.keep)
            if stopping:
                break

        if step < config.steps:
            display.note(f"stopped on request after step {step}; the same command continues the run")
    stop.drain()
    if log is not None:
        log.close()
        if step == config.steps:
            finish_run(out, config, report, display)
    return step == config.steps


# ------------------------------------------------------------------------------------------------------- the run


def run(config: RunConfig, device: torch.device) -> int:
    """Builds everything, trains, and returns the exit code."""
    ranks = distributed.start(device, timeout_minutes=config.engine.timeout_minutes, verbose=config.logging.verbose)
    with ExitStack() as stack:
        failure = None
        try:
            check_slices(config.batch, ranks.world_size)
            shard_set = stack.enter_context(ShardSet.open(config.data.shards))
            check_images(config)
            loader = stack.enter_context(build_loader(config, shard_set, ranks))
            Path(config.out).mkdir(parents=True, exist_ok=True)
        except (ValueError, OSError) as error:
            failure = error
        distributed.agree(failure)
        parts = build_parts(config, loader, ranks)
        first_step = start_or_resume(config, parts)
        if ranks.is_main:
            save_config(config, Path(config.out))
        complete = train(config, parts, shard_set, loader, first_step)
    return 0 if complete else EXIT_STOPPED


def configure(arguments: list[str]) -> tuple[RunConfig, torch.device]:
    """Returns the configuration and the device, with the process set up for them."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        raise ValueError("usage: train.py CONFIG [--section.field VALUE …]; CONFIG is a YAML file as in configs/")
    config = load_config(arguments[0], arguments[1:])
    if not config.out:
        raise ValueError("out is empty; name the run's folder there or by --out FOLDER")
    device = distributed.prepare_environment(config.engine.device)
    if not config.logging.verbose:
        distributed.quiet_libraries()
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    return config, device


def main(arguments: list[str]) -> NoReturn:
    """Runs and ends the process; what a user can cause ends with one line on stderr."""
    rank = distributed.environment_rank()
    try:
        config, device = configure(arguments)
    except ValueError as error:
        complain(error, rank=rank, on_all_ranks=True)
        sys.exit(EXIT_USAGE)
    try:
        code = run(config, device)
    except RunError as error:
        complain(error, rank=rank, on_all_ranks=True, trace=config.logging.verbose)
        distributed.leave(EXIT_FAILED, orderly=True)
    except (ValueError, OSError, TooManyBadSamples, LoaderStuck) as error:
        complain(error, rank=rank, on_all_ranks=False, trace=config.logging.verbose)
        distributed.leave(EXIT_FAILED, orderly=False)
    except Exception as error:
        lost = distributed.is_lost_rank(error)
        shown = (
            RunError("another rank has ended or hangs; see what it says, and run again to continue") if lost else error
        )
        complain(shown, rank=rank, on_all_ranks=False, trace=config.logging.verbose or not lost)
        distributed.leave(EXIT_FAILED, orderly=False)
    distributed.leave(code, orderly=True)


def complain(error: Exception, *, rank: int, on_all_ranks: bool, trace: bool = False) -> None:
    """Prints an error to stderr as one line; only rank 0 does if every rank has the same one."""
    if rank and on_all_ranks:
        return
    if trace:
        traceback.print_exception(error)
    where = "" if on_all_ranks else f"rank {rank}: "
    print(f"train.py: {where}{distributed.one_line(error)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
