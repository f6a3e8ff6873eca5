"""The curation's page as a browser lays it out: counts, shares of the paper, sheets of what was dropped last."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import Browser
from layout import SCREENS, check_planted, faults, laid_out, measured

from cinemesh.data.curate.pipeline import Outcome
from cinemesh.data.curate.report import REPORT, CurationReport, write_report
from cinemesh.data.curate.settings import settings_of

Curated = tuple[Path, Outcome]


@pytest.fixture(scope="module")
def page(planted: tuple[Path, object], curated: Curated, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the planted clips' page."""
    settings = settings_of({"preset": "small", "sources": [str(planted[0])], "credits": ["Nobody, CC BY"]}, "x")
    path = tmp_path_factory.mktemp("page") / REPORT
    write_report(path, CurationReport(settings, curated[1], {"t5": {"tokens": 77, "longest": 90, "cut": 3}}))
    return path.as_uri()


@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_can_be_read(browser: Browser, curated: Curated, page: str, screen: str) -> None:
    """Its widest table has twelve columns; every picture is shown, and names of files are as long as any."""
    _, outcome = curated
    found = laid_out(browser, screen, page)
    assert list(faults(found)) == []
    dropped = {row["dropped_by"] for row in outcome.rows} - {None}
    assert len(found["images"]) >= len(dropped) > 8 and len(found["cells"]) > 150


def test_what_it_says_is_shown(browser: Browser, curated: Curated, page: str) -> None:
    """Counts of every stage, and the paper's share where it has one; on a phone each cell names its column."""
    _, outcome = curated
    laid_out(browser, "screen", page)
    text = browser.value("document.body.innerText")
    assert f"{len(outcome.kept)} of {len(outcome.rows)} clips and files are kept" in text
    assert "84.1%" in text  # of motion, Table 38: 1.32 of 1.57
    laid_out(browser, "phone", page)
    column = "getComputedStyle(document.querySelector('td.n'), '::before').content"
    assert browser.value(column) == 'attr(data-column) ": "' or "ran" in browser.value(column)


def test_faults_are_found(browser: Browser, page: str) -> None:
    """Planted: a caption that is cut, pictures onto each other and beyond the edge, one that is gone."""
    laid_out(browser, "screen", page)
    styles = {
        "a caption is cut": "figcaption { height: 5px; overflow: hidden }",
        "lie on each other": "figure img { width: 300px }",
        "beyond the edge": "figure { translate: 1100px 0 }",
    }
    check_planted(browser, styles)
    browser.value("document.images[0].src = 'data:image/png;base64,'")
    browser.wait("document.images[0].complete")
    assert any("is not there" in fault for fault in faults(measured(browser)))
