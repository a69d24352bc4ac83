"""Costs of steps: kept in a file, and measured by processes of which one may fail."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from maestri.engine.errors import RunError
from maestri.study.config import TimingConfig, load_study
from maestri.study.costs import Cost, Costs, load_costs, measure
from maestri.study.entries import read_entries
from tests.study.small_study import cost


def test_costs__round_trip(tmp_path: Path) -> None:
    costs = Costs(hardware={"cpu": "Abacus"}, stages={"key": Cost(**cost(0.25, teachers=("one",)))})
    costs.save(tmp_path / "costs.json")
    assert load_costs(tmp_path / "costs.json") == costs
    assert load_costs(tmp_path / "none.json") == Costs()
    assert costs.stages["key"].images_per_second == 32


def test_load_costs__damaged_is_told(tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text("{}")
    with pytest.raises(RunError, match="is not what was written"):
        load_costs(tmp_path / "costs.json")


def test_measure__one_that_fails_is_told(folder: Path) -> None:
    stage = read_entries(load_study(Path("study.yaml")))[0].stages[0]
    gone = replace(stage, config=replace(stage.config, data=replace(stage.config.data, shards="gone")))
    costs, turns = Costs(), []
    measure(
        [gone],
        TimingConfig(rounds=2, steps=2),
        costs,
        folder=folder / "timing",
        cores=os.sched_getaffinity(0),
        on_turn=lambda: turns.append(1),
    )
    assert len(turns) == 1 + 2
    assert costs.stages == {}
    assert costs.failures == {gone.key: "there is no folder gone; make it with `maestri shards convert SOURCE gone`"}
