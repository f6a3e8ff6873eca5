"""From a teacher's rewrites over people's verdicts to a student's pairs and score, by the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_server import KEY, ChatHandler, chat, fails, parts_of, rewrites, served
from typer.testing import CliRunner, Result

from cinemesh.errors import CinemeshError
from cinemesh.evaluation.rewriting.guideline import read_guideline
from cinemesh.evaluation.rewriting.review import read_review, verdict_of
from cinemesh.launch.cli import app

NAMES = ["red car", "dog", "cat", "house", "tree"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("teacher.yaml").write_text("model: teacher\nguideline: short\ncache: kept\ntries: 1\ntimeout_s: 20\n")
    Path("prompts.yaml").write_text("".join(f"- {{name: {n.replace(' ', '-')}, prompt: a {n}}}\n" for n in NAMES))
    return tmp_path


def ran(*words: str) -> Result:
    done = CliRunner().invoke(app, ["rewrite", *words])
    assert done.exit_code == 0, done.exception or done.output
    assert KEY not in done.output
    return done


def refused(*words: str) -> str:
    done = CliRunner().invoke(app, ["rewrite", *words])
    assert isinstance(done.exception, CinemeshError), done.exception or done.output
    return str(done.exception)


def some(handler: ChatHandler) -> None:
    """Not of the dog."""
    handler.reply(chat("woof" if "dog" in handler.prompt else parts_of(handler.prompt).answer()))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Path:
    with served(monkeypatch, some):
        said = ran("make", "teacher.yaml", "--prompts", "prompts.yaml", "--out", "out").stderr
    assert "dog is NOT rewritten, and taken as it is: the answer is refused: the answer holds no JSON: 'woof'" in said
    assert "rewritten: 4 of 5 prompts, 0 of them before" in said and "next: cinemesh rewrite serve out" in said
    return Path("out")


def decide(folder: Path, **decisions: Any) -> None:
    review = read_review(folder)
    rows = [{"name": name.replace("_", "-"), "reviewer": "ann", **given} for name, given in decisions.items()]
    (folder / "verdicts.jsonl").write_text("".join(verdict_of(row, "x", review).line() for row in rows))


ACCEPT, REJECT = {"verdict": "accept"}, {"verdict": "reject"}
EDIT = {"verdict": "edit", "parts": {"subject": "A small dog", "action": "sits in the green grass by a house",
                                     "background": "", "light": "", "camera": ""}}  # fmt: skip


def test_one_prompt_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewritten, or as it is with the reason: a script gets a prompt either way."""
    with served(monkeypatch, rewrites):
        assert ran("make", "teacher.yaml", "--prompt", "a red car").stdout == parts_of("a red car").text + "\n"
    with served(monkeypatch, fails):
        done = ran("make", "teacher.yaml", "--prompt", "a blue car")
        assert done.stdout == "a blue car\n" and "NOT rewritten" in done.stderr


def test_prompts_of_a_file_are_written_as_sample_takes_them(made: Path) -> None:
    rows = yaml.safe_load((made / "prompts.yaml").read_text())
    assert [row["name"] for row in rows] == ["red-car", "dog", "cat", "house", "tree"]
    assert rows[0]["prompt"] == parts_of("a red car").text and rows[1]["prompt"] == "a dog"
    ran("make", "teacher.yaml", "--prompts", "prompts.yaml", "--out", "out")  # of the cache, with no endpoint there
    assert yaml.safe_load((made / "prompts.yaml").read_text())[:1] == rows[:1]
    decide(made, cat=ACCEPT)
    assert "holds verdicts on other rewrites" in refused(
        "make", "teacher.yaml", "--prompts", "prompts.yaml", "--out", "out"
    )


def test_what_passed_is_exported_as_chats_and_scored(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edited rewrite stands for the teacher's; a rejected one is in neither file; the last verdict counts."""
    decide(made, red_car=ACCEPT, dog=EDIT, cat=REJECT, house=REJECT)
    with (made / "verdicts.jsonl").open("a") as file:
        file.write(json.dumps({"name": "house", "reviewer": "bob", "verdict": "accept"}) + "\n")
    said = ran("export", "out", "--out", "pairs", "--held-out", "0.3").stderr
    assert "2 pairs to train on, 1 held out, 2 rejected or without a verdict" in said
    lines = [
        json.loads(line)
        for name in ("train", "held_out")
        for line in Path(f"pairs/{name}.jsonl").read_text().splitlines()
    ]
    chats = {line["messages"][1]["content"]: line["messages"] for line in lines}
    assert chats.keys() == {"a red car", "a dog", "a house"}
    for prompt, messages in chats.items():
        assert messages[:2] == read_guideline("short").messages(prompt, 0)
        assert messages[2]["role"] == "assistant"
    assert json.loads(chats["a dog"][2]["content"]) == EDIT["parts"]
    assert json.loads(chats["a house"][2]["content"]) == json.loads(parts_of("a house").answer())
    assert "pairs/train.jsonl is there" in refused("export", "out", "--out", "pairs")

    held = Path("pairs/both.jsonl")
    held.write_text(Path("pairs/train.jsonl").read_text() + Path("pairs/held_out.jsonl").read_text())
    with served(monkeypatch, some):
        found = json.loads(ran("score", "teacher.yaml", str(held), "--json").stdout)
        shown = ran("score", "teacher.yaml", str(held)).stdout
    assert found["prompts"] == 3 and found["schema"] == found["passed"] == found["facts_kept"] == pytest.approx(2 / 3)
    assert found["overlap"] == pytest.approx(2 / 3) and found["broken"] == {"form": 1}
    assert "67%" in shown and "broken: form 1" in shown and "'a dog': the answer holds no JSON" in shown
    with served(monkeypatch, fails):
        assert "the endpoint answered 500" in refused("score", "teacher.yaml", str(held))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"name": "dog", "verdict": "accept"}, "there is nothing to accept"),
        ({"name": "cow", "verdict": "accept"}, "'cow' is no rewrite here"),
        ({"name": "cat", "verdict": "edit"}, "an edit has them"),
        ({"name": "cat", "verdict": "accept", "parts": EDIT["parts"]}, "parts are of an edit"),
        ({"name": "cat", "verdict": "like"}, "verdict is 'like'"),
        ({"name": "cat", "verdict": "edit", "parts": EDIT["parts"]}, "it keeps 0% of the prompt's words"),
        ({"name": "cat", "verdict": "edit", "parts": EDIT["parts"] | {"light": "<b>"}}, "it says '<'"),
        ({"name": 3, "verdict": "accept"}, "name is 3"),
    ],
)
def test_a_verdict_that_is_none_is_refused(row: dict[str, Any], says: str, made: Path) -> None:
    (made / "verdicts.jsonl").write_text(json.dumps({"reviewer": "ann"} | row) + "\n")
    assert says in refused("export", "out", "--out", "pairs") and not Path("pairs").exists()


def test_too_few_pairs_and_wrong_files_are_refused(made: Path) -> None:
    assert "0 rewrites were accepted or edited" in refused("export", "out", "--out", "pairs")
    decide(made, cat=ACCEPT)
    assert "1 rewrites were accepted or edited" in refused("export", "out", "--out", "pairs")
    Path("pairs.jsonl").write_text('{"messages": []}\n')
    assert "holds no messages of system, user and assistant" in refused("score", "teacher.yaml", "pairs.jsonl")
    Path("pairs.jsonl").write_text("")
    assert "holds no pair" in refused("score", "teacher.yaml", "pairs.jsonl")
    assert "takes --prompt or --prompts" in refused("make", "teacher.yaml")
    assert "name a folder for them with --out" in refused("make", "teacher.yaml", "--prompts", "prompts.yaml")
    assert "one prompt is printed" in refused("make", "teacher.yaml", "--prompt", "x", "--out", "out")
    assert "cannot read the rewrites" in refused("export", "kept", "--out", "pairs")
