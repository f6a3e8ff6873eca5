"""``--json`` of plan, explain, compare and train --dry-run is what its records say, and docs/json.md shows these.

Run as a program, it writes the page.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest
from typer.testing import CliRunner

from cinemesh.launch.cli import app
from cinemesh.launch.commands.reply import VERSION, CompareReply, DryRunReply, ExplainReply, PlanReply, SampleReply
from cinemesh.parallel.ir.plan import Plan

PAGE = Path(__file__).parents[3] / "docs" / "json.md"
SHAPE = ("--model", "tiny", "--latent", "2x8x8", "--json")
QUICK = str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")
REPLIES = {
    PlanReply: ("plan", "--gpus", "8", "--top", "3", *SHAPE),
    SampleReply: ("plan", "--sample", "--gpus", "4", *SHAPE),
    ExplainReply: ("explain", "tp=2,dp_shard=2", *SHAPE),
    CompareReply: ("compare", "tp=2,dp_shard=2", "tp=2,cp=2", *SHAPE),
    DryRunReply: ("train", QUICK, "--dry-run", "--set", "cluster=local-cpu", "--json"),
}
NAMES = {
    PlanReply: "plan",
    SampleReply: "plan --sample",
    ExplainReply: "explain",
    CompareReply: "compare",
    DryRunReply: "train --dry-run",
}


def hints(record: type) -> dict[str, tuple[Any, str]]:
    """Every key of a record in its order, with its type and meaning."""
    found = get_type_hints(record, include_extras=True)
    split = {key: get_args(kind) if get_origin(kind) is Annotated else (kind, "") for key, kind in found.items()}
    return {f.name: split[f.name] for f in fields(record)}  # type: ignore[arg-type]


# -- a reply against its record ---------------------------------------------------------------------------------------


def wrong(value: Any, kind: Any, at: str = "reply") -> Iterator[str]:
    """Where a JSON value is not of a type."""
    inner = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        if all([*wrong(value, one, at)] for one in inner):
            yield f"{at} is none of {inner}"
    elif get_origin(kind) is list and isinstance(value, list):
        for i, one in enumerate(value):
            yield from wrong(one, inner[0], f"{at}[{i}]")
    elif get_origin(kind) is dict and isinstance(value, dict):
        for key, one in value.items():
            yield from wrong(one, inner[1], f"{at}.{key}")
    elif is_dataclass(kind) and isinstance(value, dict):
        said = hints(kind)  # type: ignore[arg-type]
        if [*value] != [*said]:
            yield f"{at} has the keys {[*value]}, not {[*said]}"
        for key in said.keys() & value.keys():
            yield from wrong(value[key], said[key][0], f"{at}.{key}")
    elif kind is not Any and type(value) not in ((float, int) if kind is float else (kind,)):
        yield f"{at} is {value!r}, no {kind}"


@pytest.fixture(scope="module")
def told() -> dict[type, Any]:
    ran = {record: CliRunner().invoke(app, [*asked]) for record, asked in REPLIES.items()}
    return {record: json.loads(done.stdout) for record, done in ran.items()}


@pytest.mark.parametrize("record", REPLIES, ids=lambda record: record.__name__)
def test_a_reply_has_exactly_its_keys_in_their_order(told: dict[type, Any], record: type) -> None:
    assert [*wrong(told[record], record)] == []
    assert told[record]["schema"] == {"name": NAMES[record], "version": VERSION}


def test_what_is_asked_for_besides_is_of_its_type() -> None:
    asked = ["plan", "--gpus", "8", "--top", "2", "--explain", *SHAPE]
    reply = json.loads(CliRunner().invoke(app, asked).stdout)
    assert [*wrong(reply, PlanReply)] == [] and reply["why"]["sensitivities"]


def test_plans_are_the_best_first_and_say_what_the_whole_step_says(told: dict[type, Any], tmp_path: Path) -> None:
    """By ``explain`` of the best one: HFU and exposure of a few blocks would otherwise be figures of their own."""
    plans = told[PlanReply]["plans"]
    rates = [plan["samples_per_s"] for plan in plans]
    assert rates == sorted(rates, reverse=True) and len(plans) == 3
    near = told[PlanReply]["near"]
    assert told[PlanReply]["near_ties"] == [i for i in (1, 2) if rates[i] >= (1 - near) * rates[0]]
    for plan in plans:
        assert plan["step_s_low"] < plan["step_s"] < plan["step_s_high"]
        assert plan["exposed_fraction"] == plan["exposed_s"] / plan["step_s"]
    (tmp_path / "best.yaml").write_text(Plan.from_dict(plans[0]["plan"]).to_yaml())
    asked = ["explain", str(tmp_path / "best.yaml"), "--samples", str(plans[0]["samples"]), *SHAPE]
    whole = json.loads(CliRunner().invoke(app, asked).stdout)
    for key in ("step_s", "mfu", "hfu", "exposed_s", "compute_s", "samples_per_s"):
        assert plans[0][key] == pytest.approx(whole[key], rel=1e-3), key
    assert all(plans[0][key] == whole[key] for key in ("plan", "gpus", "samples", "global_batch", "limit_bytes"))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda reply: reply.pop("near"), "has the keys"),
        (lambda reply: reply.update(more=1), "has the keys"),
        (lambda reply: reply.update(gpus=reply.pop("gpus")), "has the keys"),
        (lambda reply: reply["plans"][1].update(hfu="high"), r"plans\[1\].hfu is 'high'"),
        (lambda reply: reply.update(near_ties=[0.5]), r"near_ties\[0\] is 0.5"),
        (lambda reply: reply.update(predicted=1), "predicted is 1"),
        (lambda reply: reply.update(why={}), "why is none of"),
    ],
)
def test_a_reply_of_another_form_is_found(told: dict[type, Any], fault: Any, said: str) -> None:
    reply = json.loads(json.dumps(told[PlanReply]))
    fault(reply)
    assert re.search(said, "\n".join(wrong(reply, PlanReply)))


# -- the page ---------------------------------------------------------------------------------------------------------


def name(kind: Any) -> str:
    """A type as JSON has it."""
    inner = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(name(one) for one in inner)
    if get_origin(kind) is list:
        return f"list of {name(inner[0])}"
    if get_origin(kind) is dict:
        return "object" if inner[1] is Any else f"object of {name(inner[1])}"
    if is_dataclass(kind):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"  # type: ignore[union-attr]
    return {int: "integer", float: "number", str: "text", bool: "true or false", types.NoneType: "null"}[kind]


def inner_records(kind: Any) -> Iterator[type]:
    if isinstance(kind, type) and is_dataclass(kind):
        yield kind
    for one in get_args(kind):
        yield from inner_records(one)


def page() -> str:
    lines = [
        "# What `--json` prints: plan, explain, compare, train --dry-run",
        "",
        f"Version {VERSION}, as `schema` says in each reply. Every key is always there, in this order; what was not",
        "asked for is null. The version goes up where a key goes or changes its meaning, type or place; a new key may",
        "come behind the others of its record without. Every number is predicted. This page is written by",
        "`python tests/launch/commands/test_reply.py` from `launch/commands/reply.py`.",
        "",
        "    cinemesh plan --gpus 6144 --json",
    ]
    waiting: list[type] = [*REPLIES]
    shown: set[type] = set()
    while waiting:
        record = waiting.pop(0)
        if record in shown:
            continue
        shown.add(record)
        said = " ".join((record.__doc__ or "").replace("``", "`").split())
        lines += ["", f"## {record.__name__}", "", said, "", "| key | type | meaning |", "|---|---|---|"]
        for key, (kind, meaning) in hints(record).items():
            lines.append(f"| `{key}` | {name(kind)} | {meaning} |")
            waiting += inner_records(kind)
    return "\n".join(lines) + "\n"


def test_the_page_shows_the_records() -> None:
    assert PAGE.read_text() == page(), f"run python {Path(__file__).name}"


if __name__ == "__main__":
    PAGE.write_text(page())
