"""Trains a masked image model with its teachers: ``python train.py CONFIG [CONFIG …] [--section.field VALUE …]``.

One process needs no launcher; several are started by ``torchrun --nproc-per-node N train.py CONFIG …`` or
``deepspeed --no_local_rank train.py CONFIG …``.  The same command continues a run that was stopped or killed.
Several configurations are stages: each is trained to its end before the next, whose ``initial.run`` names the run
before; flags hold for all of them.

Exit codes: 0 the run is complete; 2 the configuration is wrong; 1 the run failed, with one line that says why;
75 stopped by SIGTERM or SIGINT after writing a checkpoint.
"""

import gc
import itertools
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import torch

from maestri.engine import checkpoint, continuation, distributed
from maestri.engine.boards import open_boards
from maestri.engine.build import build_loader, build_parts, build_student
from maestri.engine.config import RunConfig, as_plain
from maestri.engine.config_files import load_config, save_config
from maestri.engine.continuation import Continued, Parts
from maestri.engine.display import Display
from maestri.engine.distributed import Ranks
from maestri.engine.errors import LostRank, RunError
from maestri.engine.garbage import collected_in_step
from maestri.engine.lock import locked
from maestri.engine.logs import RunLog, read_rows, write_summary
from maestri.engine.schedules import scheduled
from maestri.engine.spans import SpanRecorder, recording, span
from maestri.engine.start import check_slices
from maestri.engine.step import set_schedules, train_step
from maestri.engine.stop import EXIT_STOPPED, StopRequest
from maestri.engine.watch import Watch
from maestri.evals.protocol import KnnReport
from maestri.evals.report import figures as knn_figures
from maestri.evals.report import plot_run
from maestri.evals.report import summary as knn_summary
from maestri.evals.report import table as knn_table
from maestri.evals.run import can_judge, check_images, judge, live_encoders
from maestri.model.method import Method
from maestri.pipelines.ahead import LoaderStuck
from maestri.pipelines.batch import Batch
from maestri.pipelines.loader import Loader
from maestri.pipelines.reader import TooManyBadSamples
from maestri.pipelines.show import save_views_picture
from maestri.profiler.live import LiveProfile
from maestri.profiler.utilisation import Utilisation, flops_per_image
from maestri.shards.shard_set import ShardSet

EXIT_FAILED = 1
EXIT_USAGE = 2


# -------------------------------------------------------------------------------------------------- the loop's parts


def start_or_resume(config: RunConfig, parts: Parts) -> Continued:
    """Returns where the run found in ``config.out`` goes on: after 0 steps if there is none."""
    out = Path(config.out)
    if config.resume == "never" and parts.ranks.is_main:
        checkpoint.discard(out)
    distributed.wait_for_all()
    if checkpoint.latest(out) is None:
        return Continued(step=0, notes=())
    return continuation.resume(out, parts, config=as_plain(config))


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
    final = step == config.steps and config.evaluation.full_at_end
    if not can_judge(config, final=final):
        return None
    return judge(config, live_encoders(parts.method, parts.engine.module), parts.ranks.device, final=final)


def finish_run(out: Path, config: RunConfig, report: KnnReport | None, display: Display) -> None:
    """Leaves ``summary.json`` and the plot of a complete run, and shows the final accuracies."""
    knn = knn_summary(report) if report else {}
    write_summary(out, {"images": config.steps * config.batch.global_size, "knn": knn})
    rows = read_rows(out / "metrics.jsonl")
    plot_run(rows, out / "curves.png", full_at_end=config.evaluation.full_at_end)
    if report:
        display.show(knn_table(report))


def teacher_momenta(method: Method, step: int) -> dict[str, float]:
    """Returns the momentum of each teacher at a 0-based optimizer step."""
    return {f"momentum_{role}": teacher.momentum(step) for role, teacher in method.teachers.items()}


def open_log(config: RunConfig, first_step: int) -> RunLog:
    """Returns the log of a run that goes on after ``first_step`` steps, with its configuration written beside it."""
    out = Path(config.out)
    save_config(config, out)
    boards = open_boards(config.logging, out, first_step=first_step, config=as_plain(config))
    return RunLog(out, first_step=first_step, boards=boards)


def is_due(step: int, every: int) -> bool:
    """Returns whether something that happens ``every`` steps (0 = never) happens after ``step`` steps."""
    return every > 0 and step % every == 0


def train(
    config: RunConfig,
    parts: Parts,
    loader: Loader,
    first_step: int,
    *,
    log: RunLog | None,
    watch: Watch,
    flops: float,
    notes: Sequence[str],
) -> bool:
    """Trains to the end or until asked to stop; returns whether the run is complete.

    Args:
        first_step: optimizer steps done before.
        log: of the main process; it is closed at the end of a run that ends well.
        watch: is told of each step.
        flops: of an image.
        notes: shown first.
    """
    out, ranks, meter, method = Path(config.out), parts.ranks, parts.meter, parts.method
    title = f"{config.method.name} on {ranks.world_size} × {ranks.device.type}"
    display = Display(title=title, steps=config.steps, first_step=first_step, enabled=ranks.is_main)
    stop = StopRequest(parts.control, ranks.world_size)
    spans = SpanRecorder(ranks.device)
    batches = with_picture(loader, out / "views.png" if ranks.is_main and not first_step else None)
    step, stopping, waited, report = first_step, False, 0.0, None
    utilisation = Utilisation(config, ranks, flops)

    with (
        display,
        recording(spans),
        collected_in_step(config.engine.collect_every) as collect,
        LiveProfile(config, parts, loader) as live,
    ):
        if first_step:
            display.note(f"continuing {out} after step {first_step}")
        for note in notes:
            display.note(note)
        while True:
            # Evaluate before the first step, after the last and in between; off the clock, as checkpoints are.
            if step in (0, config.steps) or is_due(step, config.evaluation.every):
                with span("evaluation"):
                    report = evaluate_run(config, parts, step)
                if log is not None and report is not None:
                    log.write("evaluation", step, knn_figures(report))
            if step == config.steps:
                break

            # One optimizer step: load, teachers, student, loss, backward, step, averages.
            meter.go_on()
            # The first row is the untrained network's: monitors of collapse are read against it.
            is_logged = step == 0 or is_due(step + 1, config.logging.every) or step + 1 == config.steps
            settings = scheduled(config.optimizer, step, num_steps=config.steps, global_size=config.batch.global_size)
            set_schedules(parts.engine, settings)
            with live.step(step):
                result = train_step(
                    parts.engine, method, parts.teachers, batches, step, guard=parts.guard, monitor=is_logged
                )
            meter.add(result.metrics, num_images=config.batch.global_size)
            step += 1
            if not result.applied:
                display.note(f"step {step} is skipped: loss or gradient is not finite; its samples: {out / 'skipped'}")
            display.advance(step)
            watch.at(step)
            with span("stop"):
                stopping = stop.agreed()
            collect(step)

            # Log: here the loop waits for the device and for other ranks.
            if is_logged:
                row = meter.take(wait_seconds=loader.wait_seconds - waited, bad_samples=loader.num_bad)
                waited = loader.wait_seconds
                row |= {"learning_rate": settings.learning_rate, **teacher_momenta(method, step - 1)}
                row |= {"skipped_steps": parts.guard.skipped, **utilisation.row(row["images_per_second"])}
                row |= {f"seconds/{name}": seconds for name, seconds in spans.take().items()}
                if log is not None:
                    log.write("train", step, row)
                display.update(step, row)
                live.look()
            meter.pause()

            # Checkpoint.
            if is_due(step, config.checkpoint.every) or step == config.steps or stopping:
                if log is not None:
                    log.sync()
                with span("checkpoint"):
                    continuation.save(out, parts, step=step, config=as_plain(config), settings=config.checkpoint)
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


def run(config: RunConfig, ranks: Ranks, watch: Watch, flops: float) -> int:
    """Builds everything, trains, and returns the exit code; ``flops`` are those of an image."""
    with ExitStack() as stack:
        failure = None
        try:
            check_slices(config.batch, ranks.world_size)
            shard_set = stack.enter_context(ShardSet.open(config.data.shards))
            check_images(config)
            loader = stack.enter_context(build_loader(config, shard_set, ranks))
            Path(config.out).mkdir(parents=True, exist_ok=True)
            if ranks.is_main:
                stack.enter_context(locked(Path(config.out)))
            method, note = build_student(config)
        except (ValueError, OSError, RunError) as error:
            failure = error
        distributed.agree(failure)
        with span("start"):
            parts = build_parts(config, method, shard_set, loader, ranks)
            continued = start_or_resume(config, parts)
        log, failure = None, None
        try:
            if ranks.is_main:
                log = open_log(config, continued.step)
                stack.callback(log.close)  # whatever ends the run
        except (OSError, RunError) as error:
            failure = error
        distributed.agree(failure)
        notes = [note] * bool(note) + list(continued.notes)
        complete = train(config, parts, loader, continued.step, log=log, watch=watch, flops=flops, notes=notes)
        parts.engine.destroy()  # its hooks would keep a stage's memory during the next
    return 0 if complete else EXIT_STOPPED


def run_stages(configs: Sequence[RunConfig], device: torch.device) -> int:
    """Joins the other ranks and trains all configurations; returns the exit code."""
    first = configs[0]
    flops = [flops_per_image(config) for config in configs]
    ranks = distributed.start(device, timeout_minutes=first.engine.timeout_minutes, verbose=first.logging.verbose)
    with Watch(ranks, timeout_seconds=60 * first.engine.timeout_minutes) as watch:
        try:
            return run_each(configs, ranks, watch, flops)
        except RuntimeError as error:
            if not distributed.is_lost_rank(error):
                raise
            raise LostRank(watch.lost()) from error


def run_each(configs: Sequence[RunConfig], ranks: Ranks, watch: Watch, flops: Sequence[float]) -> int:
    """Trains one configuration after the other, until one stops; returns the exit code."""
    for config, of_image in zip(configs, flops, strict=True):
        if len(configs) > 1 and config.resume == "auto" and checkpoint.is_complete(Path(config.out), config.steps):
            if ranks.is_main:
                print(f"{config.out} is complete", flush=True)
            continue
        if config.engine.threads:
            torch.set_num_threads(config.engine.threads)
        code = run(config, ranks, watch, of_image)
        if code:
            return code
        gc.collect()  # an engine holds itself in cycles
    return 0


def configure(arguments: list[str]) -> tuple[list[RunConfig], torch.device]:
    """Returns the configurations and the device, with the process set up for them."""
    paths = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    if not paths and not {"-h", "--help"} & set(arguments[:1]):
        raise ValueError("usage: train.py CONFIG … [--section.field VALUE …]; CONFIG is a YAML file as in configs/")
    flags = arguments[len(paths) :]
    configs = [load_config(path, flags) for path in paths or arguments[:1]]
    outs = [config.out for config in configs]
    if not all(outs):
        raise ValueError("out is empty; name the run's folder there or by --out FOLDER")
    if len(set(outs)) < len(outs):
        raise ValueError(f"out is {outs[0]} in more than one configuration; each stage needs a folder of its own")
    devices = {config.engine.device for config in configs}
    if len(devices) > 1:
        raise ValueError(f"engine.device is {' and '.join(sorted(devices))}; stages of one command share a device")
    device = distributed.prepare_environment(devices.pop())
    if not configs[0].logging.verbose:
        distributed.quiet_libraries()
    return configs, device


def main(arguments: list[str]) -> NoReturn:
    """Runs and ends the process; what a user can cause ends with one line on stderr."""
    rank = distributed.environment_rank()
    try:
        configs, device = configure(arguments)
    except ValueError as error:
        complain(error, rank=rank, on_all_ranks=True)
        sys.exit(EXIT_USAGE)
    verbose = configs[0].logging.verbose
    try:
        code = run_stages(configs, device)
    except RunError as error:
        complain(error, rank=rank, on_all_ranks=True, trace=verbose)
        distributed.leave(EXIT_FAILED, orderly=True)
    except (ValueError, OSError, TooManyBadSamples, LoaderStuck, LostRank) as error:
        complain(error, rank=rank, on_all_ranks=False, trace=verbose)
        distributed.leave(EXIT_FAILED, orderly=False)
    except Exception as error:
        complain(error, rank=rank, on_all_ranks=False, trace=True)
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
