"""``maestri study CONFIG``: compares methods, and goes on where it was interrupted."""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import Progress

from maestri.engine.distributed import one_line, quiet_libraries
from maestri.engine.errors import RunError
from maestri.engine.lock import locked
from maestri.engine.stop import EXIT_STOPPED
from maestri.study.config import StudyConfig, load_study
from maestri.study.costs import Costs, load_costs, measure, untimed
from maestri.study.entries import Entry, read_entries
from maestri.study.plan import run_folder, runs_of
from maestri.study.progress import StudyProgress
from maestri.study.report import write_report
from maestri.study.results import gather
from maestri.study.runner import Slot, cores_of_slots, run_all
from maestri.study.works import JUDGEMENT, baseline_work, check_places, work_of, write_failure

EXIT_FAILED = 1
EXIT_USAGE = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyArguments:
    """Compare methods at equal images and at equal minutes; docs/study.md says how a study is written.

    What is finished is not run again: the same command continues a study that was interrupted.
    """

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """The study, a YAML file as configs/study_small.yaml."""
    report_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Time and run nothing; write the report of what is there."""
    program: Path | None = None
    """train.py; the one beside the installed rooms by default, which only a checkout has."""


def run(argv: Sequence[str]) -> int:
    """Runs ``maestri study`` and returns its exit code: 0, 1 if a run failed, 2 after wrong usage, 75 interrupted."""
    console = Console()
    quiet_libraries()
    arguments = tyro.cli(StudyArguments, prog="maestri study", args=argv, use_underscores=False)
    try:
        study = load_study(arguments.config)
    except ValueError as error:
        return _complain(one_line(error), EXIT_USAGE)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _study(study, arguments, console)
    except ValueError as error:
        return _complain(f"{arguments.config}: {one_line(error)}", EXIT_USAGE)
    except (RunError, OSError) as error:
        return _complain(one_line(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return _complain(f"interrupted; 'maestri study {arguments.config}' goes on from here", EXIT_STOPPED)
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _complain(line: str, code: int) -> int:
    print(f"maestri study: {line}", file=sys.stderr)
    return code


def _study(study: StudyConfig, arguments: StudyArguments, console: Console) -> int:
    out = Path(study.out)
    entries = read_entries(study, open_images=not arguments.report_only)
    failed = 0
    if not arguments.report_only:
        program = _program(arguments.program)
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            # Before steps are timed, what can be known without.
            sized = runs_of(study, entries, {stage.key: 60.0 for entry in entries for stage in entry.stages})
            check_places([run for run in sized if run.budget == "images"])
            costs = _timed(study, entries, console)
            try:
                failed = _run(study, entries, costs, program, console)
            except KeyboardInterrupt:
                write_report(study, arguments.config, gather(study, entries, costs), costs)
                raise
    elif not out.is_dir():
        raise RunError(f"there is no study in {out} yet; run it without --report-only")
    costs = load_costs(out / "costs.json")
    report = write_report(study, arguments.config, gather(study, entries, costs), costs)
    console.print(f"{report}", highlight=False, soft_wrap=True)
    if failed:
        return _complain(f"{failed} runs failed; {report} says why, the same command tries them again", EXIT_FAILED)
    return 0


def _program(given: Path | None) -> Path:
    """Returns train.py.

    Raises:
        ValueError: it is not there.
    """
    program = given or Path(__file__).resolve().parents[1] / "train.py"
    if not program.is_file():
        raise ValueError(f"there is no {program}; train.py is in a checkout of Maestri: name it by --program FILE")
    return program


def _timed(study: StudyConfig, entries: Sequence[Entry], console: Console) -> Costs:
    """Returns what steps cost, those that are not known yet measured now."""
    path = Path(study.out) / "costs.json"
    costs = load_costs(path)
    groups = untimed(entries, costs)
    turns = sum(map(len, groups)) * (1 + study.timing.rounds)
    if not turns:
        return costs
    cores = cores_of_slots(study.jobs)[0]
    timed_on = costs.hardware.get("cores", str(len(cores)))
    if timed_on != str(len(cores)):
        raise ValueError(
            f"{path}: steps were timed on {timed_on} core(s) each, and jobs: {study.jobs} gives a run {len(cores)}: "
            "minutes would not be equal; take jobs as it was, or delete that file and the runs in minutes"
        )
    console.print(f"timing the steps of {sum(map(len, groups))} stages, in turns", highlight=False)
    folder = path.with_name("timing")
    shown = console.is_terminal
    with Progress(transient=True, disable=not shown, console=console) as progress:
        task = progress.add_task("steps", total=turns)
        for group in groups:
            on_turn = partial(progress.advance, task)
            measure(group, study.timing, costs, folder=folder, cores=cores, on_turn=on_turn)
            costs.save(path)
    return costs


def _run(study: StudyConfig, entries: Sequence[Entry], costs: Costs, program: Path, console: Console) -> int:
    """Does what is still to be done; returns how many runs failed."""
    seconds = {key: cost.step_seconds for key, cost in costs.stages.items()}
    runs = runs_of(study, entries, seconds)
    check_places(runs)
    firsts = {entry.set_name: entry for entry in reversed(entries)}
    works = [baseline_work(study, entry) for entry in reversed(firsts.values())]
    works += [work_of(run, study.sets[run.entry.set_name].judging, program) for run in runs]
    wanted = [work for work in works if work.tasks]
    if len(wanted) < len(works):
        console.print(f"{len(works) - len(wanted)} of {len(works)} runs and baselines are done", highlight=False)
    failed = _record_untimed(study, entries, costs)
    total = sum(work.seconds for work in wanted)
    slots = [Slot(cores) for cores in cores_of_slots(study.jobs)]
    with StudyProgress("runs", works=len(wanted), seconds=total, jobs=study.jobs, console=console) as progress:
        return failed + run_all(wanted, slots, progress)


def _record_untimed(study: StudyConfig, entries: Sequence[Entry], costs: Costs) -> int:
    """Leaves the reason where runs of an entry would lie whose steps could not be timed; returns how many."""
    count = 0
    for entry in entries:
        reasons = [costs.failures[stage.key] for stage in entry.stages if stage.key in costs.failures]
        for budget in entry.budgets if reasons else ():
            for seed in entry.seeds:
                folder = run_folder(Path(study.out), entry.set_name, budget, entry.name, seed)
                if not (folder / JUDGEMENT).is_file():
                    write_failure(folder, task="timing", exit_code=EXIT_FAILED, lines=reasons[:1])
                    count += 1
    return count


if __name__ == "__main__":
    os._exit(run(sys.argv[1:]))
