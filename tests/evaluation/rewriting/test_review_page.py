"""The page of verdicts in a real browser, by keyboard, over a reload; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from chat_server import parts_of
from layout import SCREENS, faults, measured, signed_in
from local_requests import ask, serving

from cinemesh.errors import CinemeshError
from cinemesh.evaluation.rewriting.guideline import Parts
from cinemesh.evaluation.rewriting.review import read_review, read_verdicts, write_review
from cinemesh.evaluation.rewriting.review_page import ReviewServer
from cinemesh.evaluation.rewriting.rewriter import Rewriter, Rewritten
from cinemesh.evaluation.rewriting.settings import RewriterSettings

EVIL = '<img src=x onerror="window.evil=1"></script><script>window.evil=1</script>'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four rewrites; what an endpoint and a user may say of one."""
    rewriter = Rewriter(RewriterSettings(model="m", guideline="short", cache=str(tmp_path / "kept")))
    found = {name: Rewritten(f"a {name}", parts_of(f"a {name}")) for name in ("car", "dog")}
    found["evil"] = Rewritten(f"a {EVIL}", Parts(subject=EVIL, action=EVIL, background="", light="", camera=""))
    found["cat"] = Rewritten("a cat", None, f"no answer: {EVIL}")
    write_review(tmp_path / "out", rewriter, found)
    return tmp_path / "out"


def test_a_verdict_is_on_the_disk_and_a_wrong_one_is_not(folder: Path) -> None:
    with serving(ReviewServer(folder, 0)) as server:
        assert server.server_address[0] == "127.0.0.1"
        status, page, _ = ask(server, "/")
        assert status == 200 and EVIL.encode() not in page and b"<img src=x" not in page
        good = {"name": "car", "reviewer": "ann", "verdict": "accept"}
        assert ask(server, "/verdict", good)[0] == 200
        for wrong in (good | {"name": "x"}, good | {"name": "cat"}, [], "{", good | {"reviewer": " "}, "x" * 40_000):
            status, body, _ = ask(server, "/verdict", wrong)
            assert status == 400 and json.loads(body)["error"]
        assert ask(server, "/verdict", good, Host="evil.example")[0] == 403
        assert ask(server, "/verdict", good, Content_Type="text/plain")[0] == 400
        assert ask(server, "/rewrites.json")[0] == ask(server, "/../rewrites.json")[0] == 404
        assert json.loads(ask(server, "/state")[1])["car"]["verdict"] == "accept"
    assert len((folder / "verdicts.jsonl").read_text().splitlines()) == 1
    with pytest.raises(CinemeshError, match="cannot read the rewrites"):
        ReviewServer(folder.parent, 0)


def shown(name: str) -> str:
    return f"!document.getElementById('{name}').hidden"


@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_can_be_read(browser: Browser, folder: Path, screen: str) -> None:
    """Guideline, a rewrite beside its prompt, and the fields of an edit."""
    with serving(ReviewServer(folder, 0)) as server:
        signed_in(browser, screen, server.address)
        browser.press("g")
        browser.wait("document.getElementById('progress').textContent === '1 of 4'")
        assert list(faults(measured(browser))) == []
        browser.press("e")
        browser.wait("document.activeElement.dataset.part === 'subject'")
        assert list(faults(measured(browser))) == []


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_rewrites_are_reviewed_by_keyboard_alone_over_a_reload(folder: Path, tmp_path: Path) -> None:
    """Accept, an edit that is refused and then mended, reject; nothing of an endpoint runs in the page."""
    progress = "document.getElementById('progress').textContent"
    message = "document.getElementById('message').textContent"
    with serving(ReviewServer(folder, 0)) as server, Browser(tmp_path / "profile") as page:
        page.open(server.address)
        page.wait("document.activeElement && document.activeElement.id === 'name'")
        page.type("ann")
        page.press("Enter")
        page.wait(shown("guideline"))
        page.press("g")
        page.wait(f"{progress} === '1 of 4'")
        page.press("a")
        page.wait(f"{progress} === '2 of 4'")
        page.reload()
        page.wait(f"document.readyState === 'complete' && {progress} === '2 of 4'")
        page.press("e")
        page.wait("document.activeElement.dataset.part === 'subject'")
        page.value("document.activeElement.select()")
        page.type("A bird")
        page.press("Enter", ctrl=True)
        page.wait(f"{message}.startsWith('not saved') && {message}.includes('of the prompt')")
        page.value("document.activeElement.select()")
        page.type("The old dog by the sea")
        page.press("Enter", ctrl=True)
        page.wait(f"{progress} === '3 of 4'")
        page.press("r")
        page.wait(f"{progress} === '4 of 4' && {message}.startsWith('no rewrite')")
        page.press("a")  # nothing to accept
        page.press("r")
        page.wait(shown("done"))
        assert page.value("window.evil === undefined")
    verdicts = read_verdicts(folder, read_review(folder))
    assert {name: str(each.verdict) for name, each in verdicts.items()} == {
        "car": "accept", "dog": "edit", "evil": "reject", "cat": "reject"
    }  # fmt: skip
    edited = verdicts["dog"].parts
    assert edited is not None and edited.text == "The old dog by the sea stands in the sun."
