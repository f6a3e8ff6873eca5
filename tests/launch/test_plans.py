"""A plan is read alike from the command line and from every file that holds one."""

from pathlib import Path

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.launch.plans import read_plan
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
        ("tp: 2\ntp: 4", "tp is given twice"),
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
