"""What two profiles differ in, and what of it is noise."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from maestri.profiler import diff_cli
from maestri.profiler.compare import compare
from maestri.profiler.findings import CACHED, REAL, Part, Profile, from_json
from tests.profiler.findings_sample import STEPS, bare_profile, sample_profile

SEEDS = 200
ENOUGH = 0.95


def pairs(*, slower: float, rounds: int = 6) -> list[tuple[Profile, Profile]]:
    """Returns profiles with 3 % of noise on every round and on every part."""
    return [
        (
            sample_profile(seed=2 * seed, noise=0.03, rounds=rounds),
            sample_profile(seed=2 * seed + 1, noise=0.03, rounds=rounds, slower=slower),
        )
        for seed in range(SEEDS)
    ]


def save(profile: Profile, folder: Path) -> Path:
    """Writes it where the command looks, and returns the folder."""
    folder.mkdir()
    (folder / "profile.json").write_text(json.dumps(profile.as_json()), encoding="utf-8")
    return folder


@pytest.mark.parametrize("rounds", [5, 6, 8])
def test_compare__like_with_like_is_noise(rounds: int) -> None:
    found = [compare(*pair) for pair in pairs(slower=1.0, rounds=rounds)]
    assert sum(not one.step.called for one in found) >= ENOUGH * SEEDS
    assert sum(not any(part.called for part in (*one.parts, *one.modes)) for one in found) >= ENOUGH * SEEDS
    quiet = next(one for one in found if not one.step.called)
    assert quiet.sentence.startswith("No change of the step beyond noise: ")


@pytest.mark.parametrize("rounds", [5, 6, 8])
def test_compare__ten_percent_are_more_than_noise(rounds: int) -> None:
    found = [compare(*pair) for pair in pairs(slower=1.1, rounds=rounds)]
    assert sum(one.step.called and one.step.difference > 0 for one in found) >= ENOUGH * SEEDS
    loud = next(one for one in found if one.step.called)
    assert loud.sentence.startswith("B is slower: ") and "spread over " in loud.sentence
    assert loud.images_per_second[1] < loud.images_per_second[0]


def test_compare__names_the_part_that_changed() -> None:
    one, other = sample_profile(seed=1), sample_profile(seed=2)
    slowed = replace(
        other,
        parts=[
            replace(part, seconds=[seconds + 0.02 for seconds in part.seconds]) if part.name == "loss" else part
            for part in other.parts
        ],
        modes={
            **other.modes,
            REAL: replace(
                other.modes[REAL], seconds=[[step + 0.02 for step in steps] for steps in other.modes[REAL].seconds]
            ),
        },
        memory={**other.memory, "activations": 12_000_000_000, "state": other.memory["state"] + 500_000},
    )
    found = compare(one, slowed)
    assert found.parts[0].name == "loss" and found.parts[0].called
    assert [part.name for part in found.parts if part.called] == ["loss"]
    assert "most of it in loss (+20.0 ms)" in found.sentence
    assert found.stall is not None and found.stall.called
    assert [change.name for change in found.memory if change.called] == ["activations"]
    assert not found.warnings
    assert compare(slowed, one).sentence.startswith("B is faster: ")


def test_compare__one_bad_round_is_no_change_and_hides_none() -> None:
    def with_stall(profile: Profile) -> Profile:
        rounds = [list(steps) for steps in profile.modes[REAL].seconds]
        rounds[3] = [1.5 * step for step in rounds[3]]
        return replace(profile, modes={**profile.modes, REAL: replace(profile.modes[REAL], seconds=rounds)})

    assert not compare(sample_profile(seed=1), with_stall(sample_profile(seed=2))).step.called
    assert compare(sample_profile(seed=1), with_stall(sample_profile(seed=2, slower=1.1))).step.called


def test_compare__one_round_does_not_tell() -> None:
    found = compare(sample_profile(rounds=1), sample_profile(rounds=1, slower=2.0))
    assert found.step.probability is None and not found.step.called
    assert found.sentence.startswith("Too few rounds to tell: ")


def test_compare__the_same_profile_and_parts_that_come_and_go() -> None:
    one = sample_profile()
    same = compare(one, one)
    assert not same.step.called and not any(change.called for change in (*same.parts, *same.modes, *same.memory))
    added = replace(one, parts=[*one.parts, Part(name="monitor", seconds=[0.004] * (6 * STEPS))])
    found = {part.name: part for part in compare(one, added).parts}
    assert found["monitor"].before == 0 and found["monitor"].difference == pytest.approx(0.004)


def test_compare__steps_of_parts_that_are_not_those_of_rounds() -> None:
    one = sample_profile()
    shorter = replace(one, parts=[replace(part, seconds=part.seconds[:-1]) for part in one.parts])
    assert len(compare(one, shorter).parts) == len(one.parts)


def test_compare__warns_of_what_is_not_alike() -> None:
    one = sample_profile()
    other = replace(
        one,
        title="other",
        images=512,
        world_size=2,
        hardware={**one.hardware, "gpu": "H200"},
        settings={**one.settings, "precision": "fp32"},
        complete=False,
    )
    warnings = "\n".join(compare(one, other).warnings)
    for part in (
        "recipes",
        "gpu is 4 × NVIDIA L40S, 48 GB | H200",
        "precision is bf16 | fp32",
        "ranks: 4 | 2",
        "1024 | 512",
    ):
        assert part in warnings
    assert "B was interrupted" in warnings


def test_compare__no_mode_in_common() -> None:
    one = sample_profile()
    with pytest.raises(ValueError, match="no mode in common"):
        compare(replace(one, modes={REAL: one.modes[REAL]}), replace(one, modes={CACHED: one.modes[CACHED]}))


def test_from_json__is_the_inverse() -> None:
    one = sample_profile()
    again = from_json(json.loads(json.dumps(one.as_json())))
    assert again.as_json() == json.loads(json.dumps(one.as_json()))


def test_run__prints_a_table_and_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    one = save(sample_profile(seed=1), tmp_path / "a")
    other = save(replace(sample_profile(seed=2, slower=1.1), world_size=2), tmp_path / "b")
    diff_cli.run([str(one), str(other / "profile.json")])
    printed = capsys.readouterr().out
    assert "warning: different numbers of ranks: 4 | 2" in printed
    assert "B is slower: " in printed
    for name in (
        "step, real, ms",
        "step, resident, ms",
        "images/s",
        "not the model’s",
        "decoder backward",
        "activations",
    ):
        assert name in printed
    assert all(len(line) <= 100 for line in printed.splitlines())


def test_run__bare_profiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = save(bare_profile(), tmp_path / "a"), save(sample_profile(), tmp_path / "b")
    diff_cli.run([str(one), str(other)])
    assert "Too few rounds to tell" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not a profile of this version"),
        (b"{}", "not a profile of this version: title: Field required"),
    ],
)
def test_run__file_that_is_no_profile(tmp_path: Path, content: bytes | None, message: str) -> None:
    good = save(sample_profile(), tmp_path / "good")
    bad = tmp_path / "bad.json"
    if content is not None:
        bad.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        diff_cli.run([str(good), str(bad)])
    assert str(error.value).startswith(str(bad)) and "\n" not in str(error.value)


def test_run__profile_without_steps(tmp_path: Path) -> None:
    empty = save(replace(sample_profile(), modes={}), tmp_path / "empty")
    with pytest.raises(ValueError, match="no step was measured"):
        diff_cli.run([str(empty), str(empty)])
