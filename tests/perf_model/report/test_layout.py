"""The report as a browser lays it out, on a screen and on a phone: it fills its column, and nothing is cut or small.

Needs playwright and a Chromium, which ``.ci/run`` installs where it can.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.parallel.ir.plan import Plan
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.played import play_step
from cinemesh.perf_model.report import report
from cinemesh.perf_model.report.page import Story, render
from cinemesh.perf_model.report.profile_page import render_profile
from cinemesh.perf_model.report.profiling import profiled
from cinemesh.perf_model.report.trace import predicted

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SCREENS: dict[str, dict[str, Any]] = {
    "screen": {"viewport": {"width": 1280, "height": 900}},
    "phone": {
        "viewport": {"width": 400, "height": 860},
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
    },
}
LEAST_PX = 11.0
FILLS = 0.8  # of its column, by a figure
PLOTTED = 0.7  # of a figure's width, by its axes
MEASURE = """() => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom] }
  const scale = t => { const m = t.getScreenCTM(); return Math.hypot(m.a, m.b) }
  const letters = [...document.querySelectorAll('h1, h2, p, li, td, th, figcaption, pre')]
  return {
    page: [document.documentElement.scrollWidth, innerWidth],
    column: document.querySelector('h1').clientWidth,
    letters: letters.map(e => parseFloat(getComputedStyle(e).fontSize)),
    cells: [...document.querySelectorAll('td')].map(e => [e.textContent, e.scrollWidth - e.clientWidth]),
    tables: [...document.querySelectorAll('table')].map(box),
    figures: [...document.querySelectorAll('figure')].map(f => ({
      title: f.querySelector('[role=img]').ariaLabel,
      frame: box(f.querySelector('.picture')),
      pictures: [...f.querySelectorAll('svg')].filter(s => s.checkVisibility()).map(s => ({
        box: box(s),
        axes: [...s.querySelectorAll('g[id^=axes_] > g[id^=patch_]:first-child')].map(box),
        texts: [...s.querySelectorAll('text')].map(t =>
          ({text: t.textContent, box: box(t), px: parseFloat(getComputedStyle(t).fontSize) * scale(t)})),
      })),
    })),
  }
}"""

Box = tuple[float, float, float, float]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium: playwright's own, or one that is installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: .ci/run does it")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as running:
        try:
            opened = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium to open the report with: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page(written: tuple[Path, list[Story]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a plan with every lane and every kind of record, whose texts are as long as any."""
    _, (story,) = written
    config, cluster = story.request.config, story.request.cluster
    plan = Plan(tp=2, cp=2, dp_shard=2, dp_replicate=2, recompute="none", recompute_last="selective", last_blocks=4)
    hard = play_step(config, plan, BatchShape(1, (2, 8, 8)), cluster)
    told = replace(story, wholes=[hard, *story.wholes])
    folder = tmp_path_factory.mktemp("layout")
    pictures = [report.picture(folder, sheet, told) for sheet in report.SHEETS]
    (folder / report.PAGE).write_text(render(told, pictures))
    return folder / report.PAGE


def crossing(a: Box, b: Box) -> float:
    """How far two boxes reach into one another, in pixels; 0 or less where they do not."""
    return min(min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1]))


def faults(found: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a page as it was measured."""
    if found["page"][0] > found["page"][1]:
        yield f"the page is {found['page'][0]} px wide, the screen {found['page'][1]}"
    if min(found["letters"]) < LEAST_PX:
        yield f"text of {min(found['letters'])} px"
    yield from (f"a cell is cut: {text}" for text, hidden in found["cells"] if hidden > 1)
    widths = [right - left for left, _, right, _ in found["tables"]]
    yield from (f"a table of {width} px in its column" for width in widths if width > found["column"] + 1)
    for figure in found["figures"]:
        title, frame = figure["title"], figure["frame"]
        if len(figure["pictures"]) != 1:
            yield f"{title}: {len(figure['pictures'])} pictures are shown of it"
            continue
        (shown,) = figure["pictures"]
        picture = shown["box"]
        if frame[2] - frame[0] < FILLS * found["column"]:
            yield f"{title}: {frame[2] - frame[0]:.0f} px of a column of {found['column']}"
        if picture[2] > frame[2] + 1:
            yield f"{title}: cut at the right"
        left, right = min(box[0] for box in shown["axes"]), max(box[2] for box in shown["axes"])
        if right - left < PLOTTED * (picture[2] - picture[0]):
            yield f"{title}: its axes have {(right - left) / (picture[2] - picture[0]):.0%} of it"
        for text in shown["texts"]:
            if text["px"] < LEAST_PX - 0.01:
                yield f"{title}: {text['text']!r} has {text['px']:.1f} px"
            if (
                crossing(text["box"], picture)
                < min(text["box"][2] - text["box"][0], text["box"][3] - text["box"][1]) - 1
            ):
                yield f"{title}: {text['text']!r} is cut"
        for a, b in itertools.combinations(shown["texts"], 2):
            if crossing(a["box"], b["box"]) > 2:
                yield f"{title}: {a['text']!r} lies on {b['text']!r}"


@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_can_be_read(browser: Any, page: Path, screen: str) -> None:
    """The picture of the step had a sixth of its width, and its two main entries beyond the edge; text had 3 px.

    On a phone, too, without a page or a picture that scrolls sideways.
    """
    context = browser.new_context(**SCREENS[screen])
    shown = context.new_page()
    shown.goto(page.as_uri())
    found = shown.evaluate(MEASURE)
    context.close()
    assert len(found["figures"]) == len(report.SHEETS)
    assert list(faults(found)) == []


@pytest.mark.parametrize("screen", SCREENS)
def test_a_profile_s_page_can_be_read(browser: Any, screen: str, tmp_path: Path) -> None:
    """A table of nine columns, with the longest names of records and lanes that there are."""
    plan = Plan(tp=2, cp=2, dp_shard=2, dp_replicate=2, micro_batches=2, dtype="float32")
    whole = play_step(preset("tiny-video"), plan, BatchShape(1, (2, 16, 16)), load("local-cpu"))
    spans = [span for span in predicted(whole) if span.kind != "wait"]
    profile = profiled([spans], [whole.step_s], whole)
    assert len(profile.rows) > 80 and len(profile.lanes) > 5
    path = tmp_path / "profile.html"
    path.write_text(render_profile("tiny-video, 2x16x16", load("local-cpu"), plan, profile, 16), encoding="utf-8")
    context = browser.new_context(**SCREENS[screen])
    shown = context.new_page()
    shown.goto(path.as_uri())
    found = shown.evaluate(MEASURE)
    context.close()
    assert list(faults(found)) == []


def test_faults_are_found(browser: Any, page: Path) -> None:
    """Planted: a narrow figure, small text, a squeezed picture, a cut cell, a text pushed out and one onto another."""
    context = browser.new_context(**SCREENS["screen"])
    shown = context.new_page()
    shown.goto(page.as_uri())
    styles = {
        "px of a column": "figure { width: 50% }",
        "cut at the right": "figure svg { width: 130% }",
        "text of 8": "figcaption { font-size: 8px }",
        "has 8.": "svg text { font-size: 6.8px !important }",
        "is cut": "svg text { translate: 0 -900px }",
        " lies on ": "svg text { font-size: 20px !important }",
        "px wide": "h1 { width: 2000px }",
        "2 pictures": ".for-phone { display: block }",
    }
    for told, style in styles.items():
        added = shown.add_style_tag(content=style)
        said = list(faults(shown.evaluate(MEASURE)))
        assert any(told in fault for fault in said), (told, said[:3])
        added.evaluate("e => e.remove()")
    context.close()
