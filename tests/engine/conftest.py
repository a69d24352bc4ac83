"""An undisturbed run of two ranks, which disturbed ones must equal."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from prove_training import Durations, Watch
from small_run import on_ranks, started, write_inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Undisturbed:
    """A folder with shards, ``small.yaml`` and the run ``whole``."""

    folder: Path
    steps: int
    durations: Durations

    @property
    def flags(self) -> tuple[str, ...]:
        """What the run was started with, beside ``--out``."""
        return ("--steps", str(self.steps))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder, steps = tmp_path_factory.mktemp("undisturbed"), 24
    write_inputs(folder)
    watch = Watch(folder / "whole")
    run = started(on_ranks(2, "--out", "whole", "--steps", str(steps)), folder, output=folder / "whole.log")
    durations = Durations(run, watch)
    assert durations.code == 0, (folder / "whole.log").read_text()
    return Undisturbed(folder=folder, steps=steps, durations=durations)
