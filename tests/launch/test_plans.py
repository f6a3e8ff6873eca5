"""A plan is read alike from the command line and from every file that holds one."""

import sys
from pathlib import Path

import pytest
import yaml
from training import recipe

from cinemesh.errors import CinemeshError
from cinemesh.launch import train as entry
from cinemesh.launch.plans import plan_override, read_plan
from cinemesh.launch.training.checkpoint.choosing import FOLDER, latest
from cinemesh.launch.training.checkpoint.manifest import read_manifest
from cinemesh.launch.training.recipe import read_config, read_recipe
from cinemesh.parallel.ir.plan import Plan

PLAN = Plan(tp=2, cp=2, dp_shard=3, recompute=("o", "lse"), kv_slices=2, order=("cp", "tp", "dp_shard", "dp_replicate"))


@pytest.mark.parametrize("head", ["", "cluster: local-cpu\nplan:\n"], ids=["plan --out", "a recipe"])
def test_a_file_gives_the_plan_that_was_written(head: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(head + "".join(f"{'  ' * bool(head)}{line}\n" for line in PLAN.to_yaml().splitlines()))
    assert read_plan(str(path)) == PLAN
    assert read_plan(str(path), dtype="float64").dtype == "float64"


def test_a_text_gives_what_it_says_over_the_defaults() -> None:
    text = "tp=2,cp=2,dp_shard=3,recompute=o:lse,kv_slices=2,order=cp:tp:dp_shard:dp_replicate"
    assert read_plan(text) == PLAN
    assert read_plan(text, dtype="float32").dtype == "float32"
    assert read_plan(f"{text},dtype=float64", dtype="float32").dtype == "float64"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "No such file"),
        ("a: [", "not valid YAML"),
        ("plan: auto", "the plan there is 'auto'"),
        ("[tp, 2]", "must be a mapping of fields"),
        ("{1: 2}", "unknown key '1'; known: tp"),
        ("tp: 2\ntp: 4", "key 'tp' is given twice"),
        ("ttp: 2", "did you mean 'tp'"),
        ("tp: two", "tp is 'two'"),
    ],
)
def test_what_holds_no_plan_is_one_message(content: str | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CinemeshError, match=told) as error:
        read_plan(str(path))
    assert "\n" not in str(error.value)


# -- from the planner to a run ----------------------------------------------------------------------------------------


@pytest.fixture
def config(clips: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(clips, tmp_path)))
    return path


def test_a_recipe_takes_what_the_planner_wrote(config: Path, tmp_path: Path) -> None:
    """As its plan, and in place of its plan; whole, nothing of the recipe's own section is left."""
    best = tmp_path / "a plan: of mine.yaml"  # what YAML would read as a mapping
    best.write_text(PLAN.to_yaml())
    assert read_config(config, plan_override(str(best))).plan == PLAN
    assert read_config(config, plan_override("tp=2,kv_slices=1")).plan == Plan(tp=2)
    values = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(values | {"plan": str(best)}))
    assert read_config(config).plan == PLAN
    config.write_text(yaml.safe_dump(values | {"cluster": "local-cpu"}))
    _, auto = read_recipe(config, plan_override("auto"))
    assert auto is not None and auto.cluster == "local-cpu"
    with pytest.raises(CinemeshError, match=r"cannot read the plan gone\.yaml"):
        read_config(config, plan_override("gone.yaml"))


@pytest.mark.usefixtures("one_process")
def test_torchruns_entry_trains_by_a_plan_file_and_says_what_next(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint says which plan ran; the line that is told makes a clip of it."""
    best = tmp_path / "best.yaml"
    best.write_text(Plan(micro_batches=2, dtype="float32", recompute="full").to_yaml())
    monkeypatch.setattr(sys, "argv", ["train", str(config), "--plan", str(best), "--set", "schedule={steps: 1}"])
    with pytest.raises(SystemExit) as done:
        entry.main()
    assert done.value.code == 0
    newest = latest(tmp_path / "run" / FOLDER)
    assert newest is not None and Plan.from_dict(read_manifest(newest).plan) == read_plan(str(best))
    told = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("wrote "))
    assert told.startswith(f"wrote {newest}; next: cinemesh sample {config} ")
