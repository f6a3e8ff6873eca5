"""What a resumed run may change: freely, told, or refused unless asked for; every key of a recipe has its rule."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
from training import in_two_buckets, recipe, refusal, start

from cinemesh.errors import CinemeshError
from cinemesh.launch.training import resume
from cinemesh.launch.training.checkpoint.choosing import FOLDER, latest
from cinemesh.launch.training.differences import RECIPE, recipe_facts, recorded
from cinemesh.launch.training.recipe import check_config
from cinemesh.launch.training.resume import CONTENTS, Allowed, allowed_changes, check_may_change, rule_of

PAGE = Path(resume.__file__).parents[2] / "docs" / "operations.md"
pytestmark = pytest.mark.usefixtures("one_process")


def test_every_key_has_one_rule(values: dict[str, Any]) -> None:
    """A key that is added to recipes and forgotten here would be a KeyError in the middle of a resume."""
    values["data"]["versions"] = {"0": "a"}
    config = check_config(
        in_two_buckets(values) | {"sample": {}, "kernels": {"all": "reference"}, "start_from": {"checkpoint": "a"}},
        "test",
    )
    keys = [*recipe_facts(config), CONTENTS]
    rules = {key: rule_of(key) for key in keys}
    assert set(Allowed) == set(rules.values())
    unused = [name for name in resume.ALLOWED if not any(key == name or key.startswith(f"{name}.") for key in keys)]
    assert unused == [], "a rule of a key that no recipe has"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (Allowed.FREE, "plan.tp"),
        (Allowed.FREE, "plan.micro_batches"),
        (Allowed.FREE, "data.captions"),  # the file's name
        (Allowed.TOLD, "optimizer.lr"),
        (Allowed.TOLD, "schedule.decay"),
        (Allowed.ASKED, "seed"),
        (Allowed.ASKED, "optimizer.betas"),
        (Allowed.ASKED, "caption_dropout"),
        (Allowed.ASKED, "data.global_batch"),
        (Allowed.ASKED, "data.buckets.1.weight"),
        (Allowed.ASKED, "plan.dtype"),
        (Allowed.ASKED, CONTENTS),
    ],
)
def test_the_rules_are_those_of_the_page(change: Allowed, key: str) -> None:
    assert rule_of(key) is change


def test_the_page_of_operations_lists_the_rules() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    listed = {name: end.strip(" |") for row in rows for names, _, end in [row[2:].partition(" | ")]
              for name in names.strip("`").split("`, `")}  # fmt: skip
    assert listed == {name: change.value for name, change in resume.ALLOWED.items()}


def note_of(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Of a checkpoint that was written with another value of one key."""
    then: dict[str, Any] = copy.deepcopy(recorded(check_config(values, "test")))
    *path, last = key.split(".")
    section: Any = then
    for name in path:
        section = section[int(name)] if name.isdigit() else section[name]
    section[last] = value
    return {RECIPE: then, CONTENTS: "same"}


@pytest.mark.parametrize(
    ("key", "was", "line"),
    [
        ("plan.micro_batches", 2, None),
        ("optimizer.lr", 0.5, "optimizer.lr: 0.5 -> 0.01"),
        ("schedule.steps", 9, "schedule.steps: 9 -> 6"),
    ],
)
def test_what_may_change_is_told_or_not(values: dict[str, Any], key: str, was: Any, line: str | None) -> None:
    assert allowed_changes(note_of(values, key, was), check_config(values, "test"), "same") == ([line] if line else [])


@pytest.mark.parametrize(
    ("key", "was", "asked"),
    [
        ("seed", 7, "seed"),
        ("optimizer.betas", [0.9, 0.99], "optimizer"),
        ("caption_dropout", 0.5, "caption_dropout"),
        ("data.global_batch", 4, "data.global_batch"),
        ("plan.dtype", "bf16", "plan.dtype"),
    ],
)
def test_what_makes_it_another_run_is_refused_unless_asked_for(
    values: dict[str, Any], key: str, was: Any, asked: str
) -> None:
    note = note_of(values, key, was)
    with pytest.raises(CinemeshError, match=rf"not as in the run so far: {key}: .* -> .*may_change=\[{key}\]"):
        allowed_changes(note, check_config(values, "test"), "same")
    with pytest.raises(CinemeshError, match=rf"not as in the run so far: {key}: "):
        allowed_changes(note, check_config(values | {"may_change": ["weights"]}, "test"), "same")
    (line,) = allowed_changes(note, check_config(values | {"may_change": [asked]}, "test"), "same")
    assert line.startswith(f"{key}: ")


def test_other_contents_under_the_same_names_are_refused(values: dict[str, Any]) -> None:
    note = {RECIPE: recorded(check_config(values, "test")), CONTENTS: "others"}
    with pytest.raises(CinemeshError, match=r"data\.contents: others -> same.*may_change=\[data\.contents\]"):
        allowed_changes(note, check_config(values, "test"), "same")
    asked = check_config(values | {"may_change": ["data.contents"]}, "test")
    assert allowed_changes(note, asked, "same") == ["data.contents: others -> same"]
    assert allowed_changes({}, asked, "same")[0].startswith("the checkpoint does not say")


def test_a_name_that_is_no_key_is_refused_before_the_run(values: dict[str, Any], tmp_path: Path) -> None:
    assert "did you mean 'optimizer.betas'?" in refusal(values, tmp_path, "may_change=[optimizer.beta]")
    check_may_change(check_config(values | {"may_change": ["optimizer", "data.contents", "seed"]}, "test"))


def test_a_run_goes_on_with_what_it_may_and_stops_before_what_it_may_not(
    values: dict[str, Any], clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a person meets it: other captions in the same file too; and a change that was asked for is asked for once."""
    own = tmp_path / "captions.yaml"
    shutil.copy(clips / "captions.yaml", own)
    values["data"]["captions"] = str(own)
    values["schedule"] = {"steps": 1}

    def lines(*overrides: str) -> list[str]:
        assert start(values, tmp_path, *overrides) == 0
        out = capsys.readouterr().out.splitlines()
        return [line.partition("so far: ")[2] for line in out if line.startswith("not as in the run so far: ")]

    def refused(*overrides: str) -> str:
        assert start(values, tmp_path, *overrides) == 2
        return capsys.readouterr().err

    assert lines() == lines() == []
    assert sorted(lines("optimizer.lr=0.02", "schedule.steps=2")) == [
        "optimizer.lr: 0.01 -> 0.02",
        "schedule.steps: 1 -> 2",
    ]
    again = ("optimizer.lr=0.02", "schedule.steps=3")
    assert "error: not as in the run so far: seed: 0 -> 5; put it back" in refused(*again, "seed=5")
    assert "seed: 0 -> 5" in lines(*again, "seed=5", "may_change=[seed]")
    assert lines(*again, "seed=5") == []
    own.write_text(own.read_text().replace("It moves.", "It runs."))
    assert "error: not as in the run so far: data.contents: " in refused(*again, "seed=5")
    newest = latest(tmp_path / "run" / FOLDER)
    assert newest is not None and newest.name == "step-00000003"


def test_two_recipes_of_the_same_data_have_the_same_contents(clips: Path, tmp_path: Path) -> None:
    """Moved, or built again elsewhere; what is made of them is not asked for a word."""
    values = recipe(clips, tmp_path)
    values["schedule"] = {"steps": 1}
    assert start(values, tmp_path) == 0
    moved = tmp_path / "moved"
    shutil.copytree(clips, moved)
    values["data"] |= {"clips": [str(moved / "a.mp4")], "captions": str(moved / "captions.yaml"),
                       "cache": str(tmp_path / "another")}  # fmt: skip
    assert start(values, tmp_path, "schedule.steps=2") == 0
