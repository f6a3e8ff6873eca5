"""The judging page over http: what is served, what is not, and that no vote is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from clip_folders import bench, clip
from layout import SCREENS, faults, measured, signed_in
from local_requests import ask, serving

from cinemesh.errors import CinemeshError
from cinemesh.evaluation.ballot_box import BallotBox
from cinemesh.evaluation.bench import read_prompts
from cinemesh.evaluation.blinding import Draw, make_pairs, read_pairs
from cinemesh.evaluation.serving import JudgeServer
from cinemesh.evaluation.votes import Answer, Vote, read_key, read_votes

NAMES = ["dog", "cat", "sea"]
AXES = ["alignment", "consistency"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    for n, system in enumerate(("secretnew", "secretold")):
        for i, name in enumerate(NAMES):
            clip(folder / system / f"{name}.mp4", 10 * n + i, frames=24)
    prompts = read_prompts(bench(folder / "bench.yaml", NAMES))
    folders = [folder / "secretnew", folder / "secretold"]
    make_pairs(folders, prompts, folder / "out", AXES, {}, Draw(identical=0, repeated=0), fitted=False)
    return folder / "out"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "judged"))


def state(server: JudgeServer, rater: str) -> dict[str, Any]:
    return json.loads(ask(server, f"/state?rater={rater}")[1])


def a_vote(**changes: object) -> dict[str, object]:
    return {"pair": "p0001", "rater": "ann", "axis": "alignment", "answer": "left", "reason": "motion"} | changes


def test_the_page_holds_all_it_needs_and_no_name_of_a_system(folder: Path) -> None:
    """The guideline of every asked axis, each prompt; nothing from another host."""
    with serving(JudgeServer(folder, 0)) as server:
        status, page, headers = ask(server, "/")
        text = page.decode()
        assert status == 200 and headers["Content-Type"].startswith("text/html")
        assert all(f"A {name}." in text for name in NAMES) and "secret" not in text
        assert "<h2>alignment</h2>" in text and "<h2>consistency</h2>" in text and "<h2>realness</h2>" not in text
        assert "http://" not in text and "https://" not in text and "src=" not in text.partition("<script>")[0]


def test_files_are_served_whole_and_in_ranges(folder: Path) -> None:
    """A player asks for ranges to go back to the first frame."""
    name = read_pairs(folder).pairs[0].left
    whole = (folder / "clips" / name).read_bytes()
    with serving(JudgeServer(folder, 0)) as server:
        status, body, headers = ask(server, f"/clips/{name}")
        assert (status, body, headers["Content-Type"], headers["Accept-Ranges"]) == (200, whole, "video/mp4", "bytes")
        status, body, headers = ask(server, f"/clips/{name}", Range="bytes=10-19")
        assert (status, body) == (206, whole[10:20]) and headers["Content-Range"] == f"bytes 10-19/{len(whole)}"
        assert ask(server, f"/clips/{name}", Range="bytes=100-")[1] == whole[100:]
        assert ask(server, f"/clips/{name}", Range=f"bytes={len(whole)}-")[0] == 416


@pytest.mark.parametrize(
    "path",
    [
        *("/key.json", "/clips/../key.json", "/clips/..%2fkey.json", "/pairs.json", "/votes.jsonl", "/clips/"),
        *("/clips//etc/hostname", "//etc/hostname", "/clips/p0001-left.mp4/../../key.json", "/../key.json"),
    ],
)
def test_no_path_leaves_the_clips(path: str, folder: Path) -> None:
    with serving(JudgeServer(folder, 0)) as server:
        status, body, _ = ask(server, path)
        assert status == 404 and b"secret" not in body


def test_only_this_machine_and_this_page_may_vote(folder: Path) -> None:
    """A name that another page leads here, a form of another page, another address, a book of a vote."""
    with serving(JudgeServer(folder, 0)) as server:
        assert server.address == f"http://127.0.0.1:{server.server_port}/"
        assert server.server_address[0] == "127.0.0.1"
        assert ask(server, "/", Host="evil.example")[0] == 403
        assert ask(server, "/vote", a_vote(), Host="evil.example:80")[0] == 403
        assert ask(server, "/vote", a_vote(), Content_Type="text/plain")[0] == 400
        assert ask(server, "/other", a_vote())[0] == 400
        assert ask(server, "/vote", a_vote(rater="x" * 20_000))[0] == 400
        assert ask(server, "/vote", a_vote(), method="PUT")[0] == 501
        for wrong in ("{", "[]", '{"pair": 1}', '{"pair": "\\ud800"}', a_vote(pair="p9"), a_vote(reason="consistency")):
            status, body, _ = ask(server, "/vote", wrong)
            assert status == 400 and json.loads(body)["error"]
        assert (folder / "votes.jsonl").read_text() == "" and ask(server, "/vote", a_vote())[0] == 200


def test_a_rater_goes_on_where_it_was_and_three_are_enough(folder: Path) -> None:
    """After a new start of the server too; a fourth rater has nothing to do on an axis with three votes."""
    with serving(JudgeServer(folder, 0)) as server:
        assert len(state(server, "ann")["open"]) == 6 and state(server, "ann")["voted"] == {}
        assert ask(server, "/vote", a_vote())[0] == 200
        assert state(server, "bob")["voted"] == {}
    with serving(JudgeServer(folder, 0)) as server:
        assert state(server, "ann")["voted"] == {"p0001": {"alignment": ["left", "motion"]}}
        for rater in ("bob", "cid"):
            assert ask(server, "/vote", a_vote(rater=rater, answer="tie", reason=""))[0] == 200
        left = state(server, "dora")["open"]
        assert len(left) == 5 and ["p0001", "alignment"] not in left
        assert ["p0001", "alignment"] in state(server, "ann")["open"], "to change it"


def test_raters_at_once_lose_nothing(folder: Path) -> None:
    """Two servers of one folder, eight raters, all at the same time: every line is whole."""
    asked = [a_vote(rater=f"r{r}", pair=f"p000{p}", axis="consistency", reason="") for r in range(8) for p in (1, 2, 3)]
    with (
        serving(JudgeServer(folder, 0)) as one,
        serving(JudgeServer(folder, 0)) as other,
        ThreadPoolExecutor(8) as raters,
    ):
        done = raters.map(lambda vote: ask((one, other)[hash(str(vote)) % 2], "/vote", vote)[0], asked)
        assert set(done) == {200}
    votes = read_votes(folder / "votes.jsonl", read_key(folder / "key.json"))
    assert {(vote.rater, vote.pair) for vote in votes} == {(vote["rater"], vote["pair"]) for vote in asked}


def test_a_crash_in_the_middle_of_a_line_loses_that_vote_alone(folder: Path) -> None:
    """A killed process has written what it confirmed; the next vote does not stick to what is torn."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from cinemesh.evaluation.ballot_box import BallotBox\n"
        "from cinemesh.evaluation.blinding import read_pairs\n"
        "folder = Path(sys.argv[1]); box = BallotBox(folder, read_pairs(folder))\n"
        "box.add({'pair': 'p0001', 'rater': 'ann', 'axis': 'consistency', 'answer': 'left'})\n"
        'os.write(box._journal._file.fileno(), b\'{"pair": "p0002", "ra\'); os.kill(os.getpid(), 9)'
    )
    killed = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, env=os.environ)
    assert killed.returncode == -9, killed.stderr
    box = BallotBox(folder, read_pairs(folder))
    assert (folder / "votes.jsonl").read_text().endswith('"}\n')
    with (folder / "votes.jsonl").open("a") as other:
        other.write('{"pair": "p0002"')  # another server's, while this one runs
    box.add({"pair": "p0003", "rater": "ann", "axis": "consistency", "answer": "tie"})
    box.close()
    assert read_votes(folder / "votes.jsonl", read_key(folder / "key.json")) == [
        Vote("p0001", "ann", "consistency", Answer.LEFT),
        Vote("p0003", "ann", "consistency", Answer.TIE),
    ]


def test_a_folder_without_pairs_and_a_port_in_use_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CinemeshError, match="cannot read the pairs"):
        JudgeServer(tmp_path, 0)
    with serving(JudgeServer(folder, 0)) as server, pytest.raises(CinemeshError, match="cannot listen on"):
        JudgeServer(folder, server.server_port)


VIDEOS = "[...document.querySelectorAll('video')]"
PROGRESS = "document.getElementById('progress').textContent"


def shown(name: str) -> str:
    """Whether the page shows the part of that name."""
    return f"!!document.getElementById('{name}') && !document.getElementById('{name}').hidden"


@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_can_be_read(browser: Browser, folder: Path, screen: str) -> None:
    """Name, guideline with its example clips, and a pair: nothing cut, small or covered; the clips fill the width."""
    with serving(JudgeServer(folder, 0)) as server:
        signed_in(browser, screen, server.address)
        browser.press("g")
        browser.wait(f"{shown('judging')} && {VIDEOS}.filter(v => v.readyState === 4).length === 2")
        found = measured(browser)
        assert list(faults(found)) == []
        (left, right), column = found["videos"], found["column"]
        assert left[1] == right[1] and (left[2] - left[0]) == pytest.approx(right[2] - right[0])
        assert (right[2] - left[0]) > 0.9 * column


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_two_videos_are_judged_by_keyboard_alone_over_a_reload(folder: Path, tmp_path: Path) -> None:
    """In a real browser: it plays both in step, saves each answer and reason, and goes on where it was."""
    with serving(JudgeServer(folder, 0)) as server, Browser(tmp_path / "profile") as page:
        page.open(server.address)
        page.wait("document.activeElement && document.activeElement.id === 'name'")
        page.type("ann")
        page.press("Enter")
        page.wait(shown("guideline"))
        page.press("g")
        page.wait(shown("judging"))
        page.wait(f"{VIDEOS}.filter(v => v.readyState === 4 && v.currentTime > 0.1).length === 2")
        assert page.value(f"{VIDEOS}.map(v => [v.videoWidth, v.videoHeight])") == [[48, 32], [48, 32]]
        page.press(" ")
        page.wait(f"{VIDEOS}.every(v => v.paused)")
        left, right = page.value(f"{VIDEOS}.map(v => v.currentTime)")
        assert abs(left - right) <= 3 / 12, "three frames apart at most, on a machine that is busy"
        page.press("ArrowLeft")
        page.wait(shown("reasons"))
        page.press("2")
        page.wait("document.getElementById('axis').textContent === 'consistency'")
        page.press("ArrowDown")
        page.wait(f"{PROGRESS} === '3 of 6'")
        page.value("window.before = true")
        page.reload()
        page.wait(f"!window.before && {shown('judging')} && {PROGRESS} === '3 of 6'")
        page.press("ArrowRight")
        page.wait(shown("reasons"))
        page.press("Enter")
        page.wait(f"{PROGRESS} === '4 of 6'")
        page.press("Backspace")
        page.wait(f"{PROGRESS} === '3 of 6'")
        page.press("ArrowDown")
        for n in (4, 5, 6):
            page.wait(f"{PROGRESS} === '{n} of 6'")
            page.press("ArrowDown")
        page.wait(shown("done"))
        assert page.value("document.getElementById('message').textContent") == ""
        assert "secret" not in page.value("document.documentElement.outerHTML")
    votes = read_votes(folder / "votes.jsonl", read_key(folder / "key.json"))
    assert [(vote.pair, vote.axis, vote.answer, vote.reason) for vote in votes] == [
        ("p0001", "alignment", "left", "motion"),
        ("p0001", "consistency", "tie", ""),
        ("p0002", "alignment", "tie", ""),
        ("p0002", "consistency", "tie", ""),
        ("p0003", "alignment", "tie", ""),
        ("p0003", "consistency", "tie", ""),
    ]
