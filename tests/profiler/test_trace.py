"""The trace of a step, as viewers read it."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from maestri.profiler.findings import Mark
from maestri.profiler.trace import as_trace, write_trace
from tests.profiler.findings_sample import bare_profile, sample_profile


def test_write_trace__complete_events_that_nest(tmp_path: Path) -> None:
    profile = sample_profile()
    write_trace(profile, tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    events = trace["traceEvents"]
    named = {(event["name"], event["args"]["name"]) for event in events if event["ph"] == "M"}
    assert named == {("process_name", "rank 0"), ("thread_name", "step")}
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == len(profile.timeline) + 1
    for event in complete:
        assert {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"} <= event.keys()
        assert event["ts"] >= 0 and event["dur"] >= 0
    assert_nests(complete)
    by_name = {event["name"]: event for event in complete}
    assert by_name["step"]["dur"] == max(event["ts"] + event["dur"] for event in complete)
    marked = next(mark for mark in profile.timeline if mark.name == "decoder backward")
    assert abs(by_name["decoder backward"]["ts"] - 1e6 * marked.begin) < 1e-3
    assert abs(by_name["decoder backward"]["dur"] - 1e6 * (marked.end - marked.begin)) < 2e-3
    assert by_name["decoder backward"]["args"]["GFLOP"] == 5060
    assert trace["otherData"]["gpu"] == profile.hardware["gpu"]


def test_as_trace__marks_that_overlap_have_their_own_line() -> None:
    marks = [
        Mark(name="backward", begin=0.0, end=0.5),
        Mark(name="all-reduce", begin=0.4, end=0.7),
        Mark(name="optimizer", begin=0.5, end=0.9),
        Mark(name="all-gather", begin=0.65, end=0.8),
    ]
    complete = [
        event
        for event in as_trace(replace(sample_profile(), timeline=marks))["traceEvents"]
        if event["ph"] == "X" and event["name"] != "step"
    ]
    assert [(event["name"], event["tid"]) for event in complete] == [
        ("backward", 0),
        ("optimizer", 0),
        ("all-gather", 0),
        ("all-reduce", 1),
    ]
    assert_nests(complete)


def test_as_trace__without_a_timeline() -> None:
    assert [event["ph"] for event in as_trace(bare_profile())["traceEvents"]] == ["M", "M"]


def assert_nests(events: list[dict]) -> None:
    """Fails where two events of a thread overlap, but neither holds the other."""
    for one, two in combinations(events, 2):
        if one["tid"] != two["tid"]:
            continue
        first, second = sorted((one, two), key=lambda event: (event["ts"], -event["dur"]))
        first_end, second_end = (round(event["ts"] + event["dur"], 3) for event in (first, second))
        assert round(second["ts"], 3) >= first_end or second_end <= first_end, (first["name"], second["name"])
