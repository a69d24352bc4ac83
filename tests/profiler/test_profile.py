"""Faults planted into a real step on real shards are found and named."""

from pathlib import Path

import pytest
import warm_python
from small_run import write_shards

from maestri.profiler.diff_cli import read_profile
from maestri.profiler.figures import straggler
from maestri.profiler.findings import UNNAMED, Profile, from_json

PROGRAM = Path(__file__).parent / "planted_program.py"
CONFIG = """
steps: 1000
data: {shards: shards, num_threads: 1, prefetch: 1}
views: {size: 32, interpolation: linear}
encoder: {patch: 8, dim: 64, heads: 2, depth: 3}
batch: {global_size: 8}
method:
  plmae:
    decoder: {dim: 24, depth: 1, heads: 2}
    class_level: {head: {hidden: 32, layers: 2, bottleneck: 16, prototypes: 16}}
    data_level: {head: {hidden: 32, layers: 2, bottleneck: 16, prototypes: 16}}
    reconstruction: {codes: 16, head: {hidden: 32, layers: 2, bottleneck: 16, prototypes: 16}}
engine: {device: cpu, precision: fp32, threads: 1}
"""
ALONE = ("healthy", "store", "page cache", "decode", "augment", "sleep", "wait", "deep", "leak")
TOGETHER = ("rank",)
pytestmark = [
    pytest.mark.alone,
    pytest.mark.timeout(1000),  # all profiles, on a noisy machine some of them with more rounds
]


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Profile]:
    folder = tmp_path_factory.mktemp("planted")
    write_shards(folder, images=400)  # more than any mode reads
    (folder / "tiny.yaml").write_text(CONFIG)
    for ranks, cases in ((1, ALONE), (2, TOGETHER)):
        done = warm_python.completed(warm_python.on_ranks(ranks, [str(PROGRAM), ".", *cases], cwd=folder), timeout=800)
        assert done.returncode == 0, done.stderr
    return {path.stem: read_profile(path) for path in folder.glob("*.json")}


def medians(profile: Profile) -> dict[str, float]:
    return {part.name: part.median for part in profile.parts}


@pytest.mark.parametrize("case", [f"{case} 1" for case in ALONE] + [f"{case} 2" for case in TOGETHER])
def test_profile__names_nearly_all_of_the_step(profiles: dict[str, Profile], case: str) -> None:
    parts = {part.name: sum(part.seconds) for part in profiles[case].parts}
    assert parts.get(UNNAMED, 0.0) < 0.05 * sum(parts.values())
    assert {"labelling_teacher", "reconstruction_teacher", "encoder", "encoder backward", "optimizer"} <= parts.keys()
    assert {"average of labelling_teacher", "collapse device", "data", "loss", "heads"} <= parts.keys()
    assert case.endswith("1") or "communication" in parts


def test_profile__healthy_run_has_all_modes_and_no_large_stall(profiles: dict[str, Profile]) -> None:
    found = profiles["healthy 1"]
    assert found.stall < 0.35  # other programs may take cores away; planted faults reach 0.5 and more
    assert {"real", "resident", "cached", "cold", "crowded"} == found.modes.keys()
    assert from_json(found.as_json()) == found


@pytest.mark.parametrize("case", ["store", "decode", "augment"])
def test_profile__names_the_cause_of_a_stall(profiles: dict[str, Profile], case: str) -> None:
    found = profiles[f"{case} 1"]
    assert found.cause == case, found.verdict
    assert found.stall > 0.3
    assert found.gains[0].images_per_second > 1.3 * found.images_per_second


def test_profile__predicts_what_more_threads_give(profiles: dict[str, Profile]) -> None:
    found = profiles["decode 1"]
    (gain,) = (gain for gain in found.gains if gain.experiment == "data.num_threads 1 → 2")
    assert gain.checked is not None and gain.checked > 1.3 * found.images_per_second
    assert 0.6 < gain.images_per_second / gain.checked < 1.6  # other programs may run beside


def test_profile__sleep_in_the_step_shows_where_it_is(profiles: dict[str, Profile]) -> None:
    slow, healthy = medians(profiles["sleep 1"]), medians(profiles["healthy 1"])
    assert slow["loss"] - healthy["loss"] > 0.028
    assert max(slow, key=lambda name: slow[name] - healthy.get(name, 0.0)) == "loss"


def test_profile__store_that_is_slow_without_the_page_cache(profiles: dict[str, Profile]) -> None:
    slow, healthy = (
        modes["cold"].step / modes["cached"].step
        for modes in (profiles["page cache 1"].modes, profiles["healthy 1"].modes)
    )
    assert slow > 1.5 and slow > 1.3 * healthy


def test_profile__call_that_waits_for_the_device_is_named(profiles: dict[str, Profile]) -> None:
    (wait,) = (wait for wait in profiles["wait 1"].waits if "planted_program.py" in wait.place)
    assert wait.operation == "item"
    assert wait.count == 4  # the student's outputs
    assert not [wait for wait in profiles["healthy 1"].waits if "planted_program.py" in wait.place]


def test_profile__teacher_twice_as_deep_is_named(profiles: dict[str, Profile]) -> None:
    deep, healthy = (
        {part.name: part.flops for part in profiles[f"{case} 1"].parts if part.flops} for case in ("deep", "healthy")
    )
    changed = {name for name in healthy if deep[name] > 1.5 * healthy[name]}
    assert changed == {"labelling_teacher", "reconstruction_teacher"}
    # In time, too, of the teacher that is all encoder; its quickest steps, for other tests run meanwhile.
    deep, healthy = (
        {part.name: min(part.seconds) for part in profiles[f"{case} 1"].parts} for case in ("deep", "healthy")
    )
    grown = [found["reconstruction_teacher"] / found["encoder"] for found in (deep, healthy)]
    assert grown[0] > 1.3 * grown[1]


def test_profile__memory_over_a_step(profiles: dict[str, Profile]) -> None:
    found = profiles["healthy 1"]
    moments = found.memory_curve
    assert [moment.seconds for moment in moments] == sorted(moment.seconds for moment in moments)
    most = max(moments, key=lambda moment: moment.bytes)
    assert most.bytes == max(found.memory_peak.values())
    held = sum(kept for name, kept in found.memory.items() if name not in ("gradients", "activations"))
    assert moments[0].bytes == held
    # Activations are there at once, and gradients come on top of what is left of them.
    assert held + 0.8 * found.memory["activations"] < most.bytes < held + 3 * found.memory["activations"]
    assert {"labelling_teacher", "encoder", "encoder backward"} <= {moment.part for moment in moments}


def test_profile__memory_of_the_data_path_and_the_page_cache(profiles: dict[str, Profile]) -> None:
    found = profiles["healthy 1"].host_memory
    assert found["page cache"] > 0
    assert found["data path"] > 0


def test_profile__slow_rank_is_named(profiles: dict[str, Profile]) -> None:
    slow = straggler(profiles["rank 2"])
    assert slow is not None and slow.rank == 1


def test_profile__leak_is_told(profiles: dict[str, Profile]) -> None:
    assert profiles["leak 1"].growth == pytest.approx(3e6, rel=0.3)
    assert profiles["healthy 1"].growth < 5e5
