"""What a study still lacks: stages to train, runs to judge; and what failed runs leave."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maestri.engine.checkpoint import is_complete
from maestri.engine.config import RunConfig, as_plain, changes_between
from maestri.engine.config_files import read_config
from maestri.shards.files import write_atomically
from maestri.study.config import JudgingConfig, StudyConfig
from maestri.study.entries import Entry
from maestri.study.plan import Run

RECIPE = "recipe.yaml"
JUDGEMENT = "judgement.json"
FAILURE = "failed.json"
"""In a run's folder: its settings, as ``train.py`` is given them; its accuracies, or why it failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A process that a run needs: a stage of its training, or its judgement."""

    name: str
    """For people."""
    command: tuple[str, ...]
    """What follows ``python``."""
    folder: Path
    """Where its output goes."""
    config: RunConfig
    """Of the stage, or of the last one."""

    @property
    def output(self) -> Path:
        """The file that takes what it says."""
        return self.folder / ("judging.txt" if self.name == "judging" else "training.txt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is done one task after the other; the first that fails ends it."""

    label: str
    """For people."""
    folder: Path
    """Where a failure is recorded."""
    seconds: float
    """Expected, of training; 0 for baselines."""
    tasks: tuple[Task, ...]
    """That are still to be done."""


def check_places(runs: Sequence[Run]) -> None:
    """Checks that every run found in its place is the one that is wanted there.

    Raises:
        ValueError: a folder holds a run with other settings; one line that names both.
    """
    for run in runs:
        for config in run.configs:
            out = Path(config.out)
            if not (out / "config.yaml").is_file():
                continue
            changes = changes_between(as_plain(read_config(out)), as_plain(config))
            if changes.refused:
                raise ValueError(
                    f"{out} holds a run with other settings: {', '.join(changes.refused)}; delete {run.folder} to "
                    "run it anew, or give the study another out"
                )


def work_of(run: Run, judging: JudgingConfig, program: Path) -> Work:
    """Returns what a run still needs: nothing, if it is trained and judged."""
    tasks, left = [], 0.0
    for number, config in enumerate(run.configs):
        out = Path(config.out)
        if not is_complete(out, config.steps):
            name = f"stage {run.entry.stages[number].name}" if len(run.configs) > 1 else "training"
            tasks.append(Task(name=name, command=(str(program), str(out / RECIPE)), folder=out, config=config))
            left = run.seconds
    last = run.configs[-1]
    if tasks or not is_judged(run.folder, conditions(judging, last), step=last.steps):
        tasks.append(_judgement(Path(last.out), run.folder, last, judging))
    return Work(label=run.label, folder=run.folder, seconds=left, tasks=tuple(tasks))


def baseline_work(study: StudyConfig, entry: Entry) -> Work:
    """Returns the judgement of raw pixels and of the untrained network, for the set of an entry."""
    folder, judging = baseline_folder(study, entry.set_name), study.sets[entry.set_name].judging
    config = dataclasses.replace(entry.stages[0].config, out=str(folder), seed=entry.seeds[0])
    is_done = is_judged(folder, conditions(judging, config), step=0)
    tasks = () if is_done else (_judgement(folder, folder, config, judging, "untrained"),)
    return Work(label=f"{entry.set_name}: baselines", folder=folder, seconds=0.0, tasks=tasks)


def baseline_folder(study: StudyConfig, set_name: str) -> Path:
    """Returns where a set's baselines are judged."""
    return Path(study.out) / "baselines" / set_name


def conditions(judging: JudgingConfig, config: RunConfig) -> dict[str, Any]:
    """Returns all that a run's accuracies depend on besides its weights."""
    evaluation = config.evaluation
    return {
        **as_plain(judging),
        "test_shards": config.data.test_shards,
        "crop_fraction": evaluation.crop_fraction,
        "temperature": evaluation.temperature,
    }


def is_judged(folder: Path, wanted: Mapping[str, Any], *, step: int | None = None) -> bool:
    """Returns whether a folder has a judgement under these conditions, after so many steps if they are given."""
    path = folder / JUDGEMENT
    if not path.is_file():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    return bool(step in (None, found["step"]) and found["settings"] == wanted)


def _judgement(run: Path, folder: Path, config: RunConfig, judging: JudgingConfig, *more: str) -> Task:
    settings = json.dumps(as_plain(judging))
    command = ("-m", "maestri.study.judge", str(run), str(folder / JUDGEMENT), settings, *more)
    return Task(name="judging", command=command, folder=folder, config=config)


def write_failure(folder: Path, *, task: str, exit_code: int, lines: Sequence[str]) -> None:
    """Writes ``failed.json`` into a run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"task": task, "exit_code": exit_code, "lines": list(lines)}
    write_atomically(folder / FAILURE, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())


def reason_of(folder: Path) -> str:
    """Returns why a run failed, in a line; empty if it did not."""
    path = folder / FAILURE
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    return f"{found['task']}: {' '.join(found['lines'][-1:]) or 'exit code ' + str(found['exit_code'])}"
