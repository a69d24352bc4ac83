"""What a person reads of a profile in a terminal."""

import io
from dataclasses import replace

from rich.console import Console

from maestri.profiler import figures
from maestri.profiler.findings import Gain, Part, Profile
from maestri.profiler.terminal import report
from tests.profiler.findings_sample import bare_profile, sample_profile

WIDTH = 100


def printed(profile: Profile) -> list[str]:
    """Returns the report's lines at 100 columns."""
    console = Console(file=io.StringIO(), width=WIDTH)
    console.print(report(profile))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= WIDTH and not any("…" in line for line in lines)
    return [line.rstrip() for line in lines]


def row(lines: list[str], start: str) -> list[str]:
    """Returns the cells of the first line that begins so."""
    return next(line for line in lines if line.startswith(start)).removeprefix(start).split()


def test_report__verdict_first_then_every_table() -> None:
    profile = sample_profile()
    lines = printed(profile)
    assert " ".join(lines[:2]).replace("  ", " ") == profile.verdict
    for title in ("modes", "parts of the step, rank 0", "data path", "gains", "memory", "4 ranks"):
        assert title in lines
    assert row(lines, "resident ")[-10:] == "the model alone: one batch that stays on the device".split()
    cells = row(lines, "decoder backward ")
    assert float(cells[0]) < float(cells[1]) and cells[2:] == ["23.3", "%", "5,060", "56", "%", "20,678"]
    assert row(lines, "decode  ")[-3:] == ["7,273", "1.26", "×"]
    assert row(lines, "together: workers ") == ["6.500", "8", "4,923", "0.85", "×"]
    assert "rank 2 is the straggler: 11.5 ms more than others, in data" in lines
    assert "most allocated: 12.5 GB, in backward" in lines


def test_report__parts_by_cost_and_the_rest_last() -> None:
    rows = figures.part_figures(sample_profile())
    assert [found.name for found in rows][:2] == ["decoder backward", "data"] and rows[-1].name == "other"
    assert sum(found.share for found in rows) - 1 < 1e-9
    assert all(one.share >= other.share for one, other in zip(rows[:-2], rows[1:-1], strict=True))
    lines = printed(sample_profile())
    begin = lines.index("parts of the step, rank 0") + 3
    assert all(line.startswith(f"{found.label} ") for line, found in zip(lines[begin:], rows, strict=False))
    assert any(line.startswith("98.7 % of the step has a name") for line in lines)


def test_report__next_to_nothing_measured() -> None:
    lines = printed(bare_profile())
    assert "Interrupted: this is what was measured until then." in lines
    assert not {"data path", "gains", "memory"} & set(lines)


def test_report__brackets_are_text() -> None:
    profile = replace(
        sample_profile(),
        gains=[Gain(cause="data", images_per_second=5000, knob="cores [0-7] [/dim]", experiment="[red]")],
    )
    assert any("cores [0-7] [/dim]" in line for line in printed(profile))


def test_report__parts_without_time() -> None:
    profile = replace(sample_profile(), parts=[Part(name="checkpoint", seconds=[0.0] * 4), Part(name="b", seconds=[])])
    assert row(printed(profile), "checkpoint ")[0] == "0.00"


def test_straggler__needs_more_than_noise() -> None:
    profile = sample_profile()
    found = figures.straggler(profile)
    assert found is not None and (found.rank, found.part) == (2, "data")
    assert figures.straggler(replace(profile, noise=0.2)) is None
    assert figures.straggler(replace(profile, ranks=profile.ranks[:1])) is None


def test_kind_of() -> None:
    kinds = {
        "data": "data",
        "labelling_teacher": "teachers",
        "averages": "teachers",
        "encoder": "student",
        "encoder backward": "backward",
        "gradient all-reduce": "communication",
        "optimizer": "optimizer",
        "other": "rest",
    }
    assert {name: figures.kind_of(name) for name in kinds} == kinds
