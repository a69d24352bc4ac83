"""Causes and gains from made-up measurements whose truth is known."""

from dataclasses import replace

import pytest

from maestri.profiler.causes import Evidence, judge, predicted_step
from maestri.profiler.findings import CACHED, CROWDED, REAL, RESIDENT, ModeTimes, Stage
from maestri.profiler.timeline import COMMUNICATION

STAGES = {"read": 0.1, "plan": 0.05, "decode": 1.0, "resize": 0.5, "colour": 0.1}
"""Milliseconds an image."""


def times(milliseconds: float, *, noise: float = 0.01) -> ModeTimes:
    seconds = [[milliseconds / 1000 * factor] * 4 for factor in (1 - noise, 1.0, 1 + noise)]
    return ModeTimes(seconds=seconds, waits=[0.0] * 3)


def evidence(
    *,
    noise: float = 0.01,
    stages: dict[str, float] = STAGES,
    threads: int = 2,
    loader_rate: float = 1e6,
    **modes: float,
) -> Evidence:
    return Evidence(
        modes={name: times(value, noise=noise) for name, value in modes.items()},
        images=100,
        world_size=1,
        stages=[Stage(name=name, seconds_per_image=value / 1000, threads=1) for name, value in stages.items()],
        loader_rate=loader_rate,
        parts={"encoder": 0.05, COMMUNICATION: 0.0},
        cores=8,
        num_threads=threads,
        read_threads=1,
        on_gpu=False,
    )


def test_predicted_step__what_waits_takes_no_core() -> None:
    stages = [
        Stage(name="read", seconds_per_image=0.002, threads=1, busy_seconds_per_image=0.00001),
        Stage(name="decode", seconds_per_image=0.0002, threads=2, busy_seconds_per_image=0.0002),
    ]
    found = replace(evidence(real=200, resident=100, cached=200, crowded=140), stages=stages)
    # Nearly all of the loader's work is decoding: without the late store it slows the model down as before.
    assert predicted_step(found, without="store") == pytest.approx(0.138, abs=0.001)
    # Threads that wait need no cores of their own.
    waits = [replace(stages[1], seconds_per_image=0.04, busy_seconds_per_image=0.001)]
    few = replace(found, stages=waits, cores=2, loader_rate=50.0, modes=found.modes | {"real": times(2000)})
    assert predicted_step(few, threads=8) == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize(
    ("cause", "found"),
    [
        ("compute", evidence(real=100, resident=99, cached=100, crowded=99)),
        ("decode", evidence(real=200, resident=100, cached=200, crowded=105)),
        ("augment", evidence(real=200, resident=100, cached=200, crowded=105, stages=STAGES | {"colour": 3.0})),
        ("plan", evidence(real=200, resident=100, cached=200, crowded=105, stages=STAGES | {"plan": 2.0})),
        ("store", evidence(real=200, resident=100, cached=120, crowded=105)),
        ("store", evidence(real=200, resident=100, cached=200, crowded=100, stages=STAGES | {"read": 2.0})),
        ("contention", evidence(real=150, resident=100, cached=150, crowded=145)),
    ],
)
def test_judge__names_the_cause(cause: str, found: Evidence) -> None:
    judgement = judge(found)
    assert judgement.cause == cause, judgement.verdict
    assert judgement.stall == pytest.approx(1 - found.modes[RESIDENT].step / found.modes[REAL].step)
    assert judgement.gains == sorted(judgement.gains, key=lambda gain: -gain.images_per_second)


def test_judge__says_when_it_is_too_noisy() -> None:
    judgement = judge(evidence(noise=0.3, real=200, resident=100, cached=200, crowded=105))
    assert judgement.verdict.startswith("Too noisy for a verdict: rounds differ by ±44%")


def test_judge__communication_of_ranks() -> None:
    found = replace(evidence(real=100, resident=99), world_size=4, parts={"encoder": 0.05, COMMUNICATION: 0.04})
    judgement = judge(found)
    assert judgement.cause == "communication" and "communication between ranks" in judgement.verdict
    (gain,) = (gain for gain in judgement.gains if gain.cause == "communication")
    assert gain.images_per_second == pytest.approx(400 / 0.06)


def test_predicted_step__halves_with_twice_the_threads_until_the_model_is_the_limit() -> None:
    found = evidence(real=160, resident=60, cached=160, crowded=60, stages={"decode": 3.2})
    assert predicted_step(found) == pytest.approx(0.160)
    assert predicted_step(found, threads=4) == pytest.approx(0.080)
    assert predicted_step(found, threads=8) == pytest.approx(0.060)
    assert predicted_step(found, threads=64) == pytest.approx(0.060)
    assert predicted_step(found, without="decode") == pytest.approx(0.060)
    assert predicted_step(found, scale={"decode": 0.5}) == pytest.approx(0.080)


def test_predicted_step__loader_slower_than_its_stages() -> None:
    """At 500 images/s a step takes the loader 200 ms, of which stages explain 100: the rest no thread shortens."""
    found = evidence(real=200, resident=60, cached=200, crowded=60, stages={"decode": 2.0}, loader_rate=500)
    assert predicted_step(found, threads=4) == pytest.approx(0.150)
    assert predicted_step(found, without="decode") == pytest.approx(0.100)


def test_predicted_step__contention_shrinks_with_the_work_beside() -> None:
    found = evidence(real=120, resident=100, cached=120, crowded=120, stages={"decode": 0.5, "resize": 0.5})
    assert predicted_step(found, without="decode") == pytest.approx(0.110)


def test_judge__without_the_optional_modes() -> None:
    judgement = judge(evidence(real=200, resident=100))
    assert judgement.cause == "decode"
    assert {CACHED, CROWDED}.isdisjoint({gain.cause for gain in judgement.gains})
