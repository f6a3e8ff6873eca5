"""Pairs to Label Studio and votes back, in the JSON that its documentation shows."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from clip_folders import bench, clip, image
from typer.testing import CliRunner

from cinemesh.errors import CinemeshError
from cinemesh.evaluation.axes import Media
from cinemesh.evaluation.bench import read_prompts
from cinemesh.evaluation.blinding import Draw, make_pairs
from cinemesh.evaluation.label_studio import interface
from cinemesh.evaluation.votes import Answer, Vote, read_key, read_votes
from cinemesh.launch.cli import app

NAMES = ["dog", "cat"]


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for n, system in enumerate(("secretnew", "secretold")):
        for i, name in enumerate(NAMES):
            image(tmp_path / system / f"{name}.png", 10 * n + i)
    prompts = read_prompts(bench(tmp_path / "bench.yaml", NAMES))
    folders = [tmp_path / "secretnew", tmp_path / "secretold"]
    make_pairs(folders, prompts, tmp_path / "judged", [], {}, Draw(identical=0, repeated=0), fitted=False)
    return tmp_path / "judged"


def run(*words: str) -> str:
    """Standard error of a command that must be done."""
    done = CliRunner().invoke(app, ["judge", *words])
    assert done.exit_code == 0, done.exception or done.output
    return done.stderr


def refused(*words: str) -> str:
    done = CliRunner().invoke(app, ["judge", *words])
    assert isinstance(done.exception, CinemeshError), done.exception or done.output
    return str(done.exception)


def selected(side: str) -> dict[str, Any]:
    """As Pairwise writes it; further fields as an export has them."""
    return {"id": "Dx_aB91ISN", "from_name": "preference", "to_name": "left,right", "type": "pairwise",
            "origin": "manual", "value": {"selected": side}}  # fmt: skip


def chosen(name: str, value: str) -> dict[str, Any]:
    return {"id": "x", "from_name": name, "to_name": "prompt", "type": "choices", "value": {"choices": [value]}}


def annotated(task: dict[str, Any], *annotations: dict[str, Any]) -> dict[str, Any]:
    """A task as a project's JSON export has it."""
    whole = [
        {"id": 1001 + i, "was_cancelled": False, "ground_truth": False, "created_at": "2026-11-29T22:16:08.728353Z",
         "updated_at": "2026-11-29T22:16:08.728353Z", "lead_time": 4.29, "completed_by": 1, "result": [], **given}
        for i, given in enumerate(annotations)
    ]  # fmt: skip
    return {"id": 1, "project": 83, "drafts": [], "predictions": [], **task, "annotations": whole}


def test_tasks_name_no_system_and_the_interface_has_every_field(judged: Path) -> None:
    said = run("export", "judged", "--out", "out")
    assert "4 tasks; 3 annotators a task" in said
    tasks = json.loads(Path("out/tasks.json").read_text())
    assert [(task["data"]["pair"], task["data"]["axis"]) for task in tasks] == [
        ("p0001", "faithfulness"), ("p0001", "flaws"), ("p0002", "faithfulness"), ("p0002", "flaws")
    ]  # fmt: skip
    assert tasks[0]["data"]["left"] == "/data/local-files/?d=judged/clips/p0001-left.png"
    root = ET.fromstring(Path("out/interface.xml").read_text())
    names = {tag.get("name") for tag in root.iter() if tag.get("name")}
    asked = {value[1:] for tag in root.iter() if (value := tag.get("value", "")).startswith("$")}
    assert asked <= tasks[0]["data"].keys()
    for tag in root.iter():
        assert set((tag.get("toName") or "left").split(",")) <= names
    assert [tag.tag for tag in root.iter() if tag.get("name") in ("left", "right")] == ["Image", "Image"]
    assert 'Video name="left"' in interface(Media.VIDEO)
    assert "secret" not in Path("out/tasks.json").read_text() + Path("out/interface.xml").read_text()
    assert "tasks.json is there" in refused("export", "judged", "--out", "out")
    run("export", "judged", "--out", "other", "--clips-at", "https://host/x")
    assert json.loads(Path("other/tasks.json").read_text())[0]["data"]["left"] == "https://host/x/p0001-left.png"


def test_votes_come_back_as_they_were_given(judged: Path) -> None:
    """Of two annotators; twice imported they are there once; a changed one takes the place of the first."""
    run("export", "judged", "--out", "out")
    first, second, third, fourth = json.loads(Path("out/tasks.json").read_text())
    ann = {"completed_by": {"id": 2, "email": "ann@host", "first_name": "", "last_name": ""}}
    no_reason = chosen("reason", "no single reason")
    tasks = [
        annotated(first, {"result": [selected("left")]}, ann | {"result": [selected("right"), no_reason]}),
        annotated(second, {"result": [chosen("neither", "neither")]}, ann | {"was_cancelled": True}),
        annotated(third, {"result": []}, ann | {"result": [selected("left")]}),
        annotated(fourth),
    ]  # fmt: skip
    Path("export.json").write_text(json.dumps(tasks))
    said = run("import", "export.json", "judged")
    assert "1 annotations are skipped, and no votes" in said and "1 annotations are without an answer" in said
    assert "4 of 4 votes new" in said and "next: cinemesh judge score judged/votes.jsonl" in said
    want = [
        Vote("p0001", "annotator 1", "faithfulness", Answer.LEFT),
        Vote("p0001", "ann@host", "faithfulness", Answer.RIGHT),
        Vote("p0001", "annotator 1", "flaws", Answer.TIE),
        Vote("p0002", "ann@host", "faithfulness", Answer.LEFT),
    ]
    key = read_key(judged / "key.json")
    assert read_votes(judged / "votes.jsonl", key) == want
    before = (judged / "votes.jsonl").read_bytes()
    assert "0 of 4 votes new" in run("import", "export.json", "judged")
    assert (judged / "votes.jsonl").read_bytes() == before
    tasks[0]["annotations"][0]["result"] = [selected("right")]
    Path("export.json").write_text(json.dumps(tasks))
    assert "1 of 4 votes new" in run("import", "export.json", "judged")
    assert read_votes(judged / "votes.jsonl", key)[0].answer is Answer.RIGHT
    CliRunner().invoke(app, ["judge", "score", "judged/votes.jsonl"], catch_exceptions=False)


def test_reasons_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for n, system in enumerate(("a", "b")):
        clip(tmp_path / system / "dog.mp4", n)
    prompts = read_prompts(bench(tmp_path / "bench.yaml", ["dog"]))
    make_pairs([tmp_path / "a", tmp_path / "b"], prompts, tmp_path / "judged", ["alignment"], {}, Draw(), fitted=False)
    run("export", "judged", "--out", "out")
    (task,) = json.loads(Path("out/tasks.json").read_text())
    assert task["data"]["reasons"] == [{"value": "subject"}, {"value": "motion"}, {"value": "no single reason"}]
    exported = [annotated(task, {"result": [selected("left"), chosen("reason", "motion")]})]
    Path("export.json").write_text(json.dumps(exported))
    run("import", "export.json", "judged")
    (vote,) = read_votes(tmp_path / "judged" / "votes.jsonl", read_key(tmp_path / "judged" / "key.json"))
    assert vote == Vote("p0001", "annotator 1", "alignment", Answer.LEFT, "motion")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"result": [selected("left"), chosen("neither", "neither")]}, "says left and tie"),
        ({"result": [selected("up")]}, "is none of this interface"),
        ({"result": [chosen("beauty", "x")]}, "is none of this interface"),
        ({"result": "x"}, "has no result"),
        ({"result": [selected("left")], "completed_by": None}, "completed_by is None"),
        ({"result": [selected("left")], "completed_by": True}, "completed_by is True"),
        ({"result": [selected("left"), chosen("reason", "motion")]}, "'motion' is no reason of faithfulness"),
    ],
)  # fmt: skip
def test_an_annotation_that_is_wrong_is_refused_and_nothing_added(
    change: dict[str, Any], says: str, judged: Path
) -> None:
    run("export", "judged", "--out", "out")
    first, second, *_ = json.loads(Path("out/tasks.json").read_text())
    exported = [annotated(second, {"result": [selected("left")]}), annotated(first, change)]
    Path("export.json").write_text(json.dumps(exported))
    said = refused("import", "export.json", "judged")
    assert says in said and "annotation 1 of task 2 of export.json" in said
    assert not (judged / "votes.jsonl").exists()


def test_an_export_of_something_else_is_refused(judged: Path) -> None:
    for text, says in (
        ("{}", "is no list of tasks"), ("[]", "holds no vote"), ("[1]", "task 1 of export.json has no data of a pair"),
        ('[{"data": {"pair": "p9", "axis": "flaws"}, "annotations": []}]', "holds no vote"),
    ):  # fmt: skip
        Path("export.json").write_text(text)
        assert says in refused("import", "export.json", "judged")
    other = {"data": {"pair": "p9", "axis": "flaws"}}
    Path("export.json").write_text(json.dumps([annotated(other, {"result": [selected("left")]})]))
    assert "'p9' is no pair of the key" in refused("import", "export.json", "judged")
