"""The report as a browser lays it out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from browser import Browser
from layout import SCREENS, check_planted, faults, laid_out

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


@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_can_be_read(browser: Browser, page: Path, screen: str) -> None:
    """The picture of the step had a sixth of its width, and its two main entries beyond the edge; text had 3 px.

    On a phone, too, without a page or a picture that scrolls sideways.
    """
    found = laid_out(browser, screen, page.as_uri())
    assert len(found["figures"]) == len(report.SHEETS)
    assert list(faults(found)) == []


@pytest.mark.parametrize("screen", SCREENS)
def test_a_profile_s_page_can_be_read(browser: Browser, screen: str, tmp_path: Path) -> None:
    """A table of nine columns, with the longest names of records and lanes that there are."""
    plan = Plan(tp=2, cp=2, dp_shard=2, dp_replicate=2, micro_batches=2, dtype="float32")
    whole = play_step(preset("tiny-video"), plan, BatchShape(1, (2, 16, 16)), load("local-cpu"))
    spans = [span for span in predicted(whole) if span.kind != "wait"]
    profile = profiled([spans], [whole.step_s], whole)
    assert len(profile.rows) > 80 and len(profile.lanes) > 5
    path = tmp_path / "profile.html"
    path.write_text(render_profile("tiny-video, 2x16x16", load("local-cpu"), plan, profile, 16), encoding="utf-8")
    found = laid_out(browser, screen, path.as_uri())
    assert list(faults(found)) == []


def test_faults_are_found(browser: Browser, page: Path) -> None:
    """Planted: a narrow figure, small text, a squeezed picture, a cut cell, a text pushed out and one onto another."""
    laid_out(browser, "screen", page.as_uri())
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
    check_planted(browser, styles)
