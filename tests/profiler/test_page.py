"""The page of a profile, in a browser."""

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.text import Text

from maestri.profiler.charts import stages_chart, ticks_up_to, timeline_chart
from maestri.profiler.findings import Gain, Mark, ModeTimes, Profile, Stage
from maestri.profiler.page import as_page, write_page
from tests.profiler.findings_sample import bare_profile, sample_profile

WIDTHS = (1280, 400)
DARK, LIGHT = 0, 1
MEASURING = """
<!doctype html><meta charset="utf-8"><body style="margin: 0">
<iframe id="page" style="border: 0" srcdoc="{page}"></iframe>
<script>
const frame = document.getElementById("page"), found = {{}};
frame.onload = () => {{
  for (const width of {widths}) {{
    frame.style.width = width + "px";
    const page = frame.contentDocument, leaves = [];
    const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {{
      const within = node.parentElement;
      if (!node.data.trim() || within.closest("title") || within.closest("svg")) continue;
      const range = page.createRange();
      range.selectNodeContents(node);
      for (const box of range.getClientRects()) leaves.push([node.data.trim(), box]);
    }}
    const overlaps = [], outside = [];
    leaves.forEach(([text, box], i) => {{
      if (box.left < -0.5 || box.right > width + 0.5) outside.push(text);
      for (const [other, its] of leaves.slice(i + 1)) {{
        const wide = Math.min(box.right, its.right) - Math.max(box.left, its.left);
        const high = Math.min(box.bottom, its.bottom) - Math.max(box.top, its.top);
        if (wide > 1 && high > 5) overlaps.push([text, other]);
      }}
    }});
    found[width] = {{scrolls: page.documentElement.scrollWidth, overlaps, outside, texts: leaves.length}};
  }}
  found.text = frame.contentDocument.body.innerText;
  const result = document.createElement("pre");
  result.id = "found";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
}};
</script>
"""
"""A document around the page, which has no script of its own and allows none."""


def browse(file: Path, folder: Path, *arguments: str) -> tuple[str, list[str]]:
    """Returns the document as a browser holds it, and what went to its console."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser is not None, "these tests need a browser; on Debian: apt-get install chromium"
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"),
            *("--enable-logging=stderr", f"--user-data-dir={folder / 'browser'}", "--virtual-time-budget=3000"),
            *(*arguments, "--dump-dom", file.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "HOME": str(folder)},
    )
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def stressed() -> Profile:
    """Returns one whose texts are long, whose figures are extreme, and where marks repeat."""
    profile = sample_profile()
    blocks = [Mark(name="encoder", begin=0.01 * k, end=0.01 * k + 0.004) for k in range(300)]
    return replace(
        profile,
        title="a_recipe_with_a_very_long_name_that_nobody_would_break_anywhere_at_all.yaml: " + profile.title,
        verdict=profile.verdict * 2,
        modes={name: ModeTimes(seconds=[[123.456]], waits=[200.0]) for name in profile.modes},
        timeline=[*blocks, Mark(name="a_part_of_the_step_with_quite_a_long_name_that_goes_on", begin=3.0, end=9.99)],
        stages=[*profile.stages, Stage(name="nothing", seconds_per_image=0.0, threads=1)],
        memory={"activations": 139_000_000_000, "x" * 60: 1},
        hardware={**profile.hardware, "a rather long kind of hardware": "/a/path/" * 30},
        gains=[Gain(cause="data", images_per_second=1e7, knob="--a.very.long.flag=" + "0," * 80)],
        stall=-0.003,
    )


@pytest.mark.parametrize(
    ("name", "profile"), [("sample", sample_profile()), ("bare", bare_profile()), ("stressed", stressed())]
)
def test_write_page__in_a_browser(tmp_path: Path, name: str, profile: Profile) -> None:
    write_page(profile, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    around = tmp_path / "around.html"
    around.write_text(MEASURING.format(page=html.escape(page), widths=list(WIDTHS)), encoding="utf-8")
    document, console = browse(around, tmp_path)
    assert not console
    match = re.search(r'<pre id="found">(.*?)</pre>', document, re.DOTALL)
    assert match is not None
    found = json.loads(html.unescape(match[1]))
    for width in WIDTHS:
        of_width = found[str(width)]
        assert of_width["texts"] > 20
        assert (of_width["scrolls"], of_width["outside"], of_width["overlaps"]) == (width, [], [])
    text = " ".join(found["text"].split())
    assert profile.verdict.strip() in text and profile.title in text
    wanted = ["Modes", "Hardware and settings", "AMD EPYC 9354, 32 cores"]
    if name == "sample":
        wanted += [
            "4,819 images/s",
            "decoder backward",
            "One step",
            "100 ms",
            "What to gain",
            "rank 2 is the straggler",
        ]
        wanted += ["4,923 images/s", "11.4 GB", "bf16", "12.5 GB", "20,678", "page cache of shards"]
        wanted += ["Memory over a step", "125.0 ms after the step", "Waits for the device", "model/plmae.py:187"]
    if name == "bare":
        wanted.append("Interrupted")
        assert not any(heading in text for heading in ("What to gain", "One step", "Data path", "Memory", "Ranks"))
    for words in wanted:
        assert words.lower() in text.lower(), words


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_write_page__alone_and_in_both_schemes(tmp_path: Path, scheme: int) -> None:
    write_page(sample_profile(), tmp_path / "page.html")
    picture = tmp_path / "page.png"
    arguments = (f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}", "--window-size=1280,900")
    document, console = browse(tmp_path / "page.html", tmp_path, *arguments)
    assert not console and "One step" in document
    image = pytest.importorskip("PIL.Image").open(picture).convert("L")
    assert (image.getpixel((2, 2)) < 64) == (scheme == DARK)


def test_as_page__needs_nothing_else() -> None:
    page = as_page(sample_profile())
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|url\(|@import|<script|<iframe|\son\w+=", page)
    assert re.findall(r'(?:href|src)="([^"]*)"', page) == ["data:,"]
    assert "None" not in page and "nan" not in Text(re.sub("<[^>]*>", " ", page)).plain.split()


def test_as_page__is_well_formed() -> None:
    open_tags: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "link"):
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    reader = Reader()
    reader.feed(as_page(sample_profile()))
    reader.close()
    assert not open_tags


def test_as_page__words_are_no_markup() -> None:
    page = as_page(replace(sample_profile(), verdict="<script>alert(1)</script>", hardware={"cpu": '"><b>'}))
    assert "<script>" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


@pytest.mark.parametrize(
    ("end", "last"), [(213.3, 200.0), (0.9, 0.8), (1.0, 1.0), (12.0, 10.0), (9990.0, 8000.0), (50.0, 50.0)]
)
def test_ticks_up_to__round_numbers(end: float, last: float) -> None:
    ticks = ticks_up_to(end)
    assert ticks[0] == 0 and ticks[-1] == pytest.approx(last) and 3 <= len(ticks) <= 6


def test_timeline_chart__bars_lie_in_the_chart() -> None:
    chart = timeline_chart(sample_profile())
    for line in chart["timeline"]:
        for bar in line["bars"]:
            assert 0 <= bar["begin"] and bar["begin"] + bar["width"] <= 100.01
    indented = [line["label"].strip() for line in chart["timeline"] if line["label"].startswith("\u2003")]
    assert indented == ["encoder", "decoder", "decoder backward", "encoder backward", "gradient all-reduce"]


def test_stages_chart__slower_than_the_model() -> None:
    chart = stages_chart(sample_profile())
    assert [stage["name"] for stage in chart["stages"] if stage["colour"] == "short"] == ["together: workers"]
    short = next(stage for stage in chart["stages"] if stage["colour"] == "short")
    assert short["width"] < chart["demand"]["at"]
