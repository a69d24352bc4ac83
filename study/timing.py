"""A stage that is built and waits for its turns; ``study.costs`` starts it: ``python -m maestri.study.timing RECIPE``.

It reads a number of steps a line from stdin, and writes a line of JSON for each to stdout, one when it is ready, and
one, after 0 steps, with what else a step costs.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from maestri.engine import distributed
from maestri.engine.config_files import load_config
from maestri.profiler.findings import REAL
from maestri.profiler.measure import hardware
from maestri.profiler.memory import resident_bytes
from maestri.profiler.trial import opened_trial


def serve(recipe: Path, answer: Callable[[Any], None]) -> None:
    """Builds a recipe's run, and makes steps as they are asked for."""
    config = load_config(recipe)
    device = distributed.prepare_environment(config.engine.device)
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    ranks = distributed.start(device, timeout_minutes=config.engine.timeout_minutes)
    libraries = _forget_peak()
    with tempfile.TemporaryDirectory() as folder, opened_trial(config, ranks, Path(folder)) as trial:
        answer({"hardware": hardware(ranks)})
        for line in sys.stdin:
            if int(line) == 0:
                break
            seconds, _ = trial.mode(REAL, int(line), lambda: None)
            answer(seconds)
        on_gpu = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else _peak_bytes() - libraries
        answer({"peak_bytes": peak, "teachers": sorted(trial.parts.method.teachers)})


def _forget_peak() -> int:
    """Returns what is resident now, after a reset of the most that was: importing libraries takes more for a while."""
    with suppress(OSError):  # a container may forbid it
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident_bytes()


def _peak_bytes() -> int:
    """Returns the most that was resident; ``getrusage`` would know what the parent had before it started this."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    """Runs the worker; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        serve(Path(sys.argv[1]), lambda found: print(json.dumps(found), file=answers, flush=True))
    except Exception as error:  # told to whoever asks
        print(json.dumps({"error": distributed.one_line(error)}), file=answers, flush=True)
        distributed.leave(1, orderly=False)
    distributed.leave(0, orderly=True)


if __name__ == "__main__":
    main()
