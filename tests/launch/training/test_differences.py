"""A run that goes on with other settings says so, key by key."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest
from training import in_two_buckets

from cinemesh.launch.training.differences import RECIPE, differences, recorded
from cinemesh.launch.training.recipe import Config, check_config
from cinemesh.parallel.ir.plan import Plan

pytestmark = pytest.mark.usefixtures("one_process")
SAMPLED = (
    "steps: 50",
    "schedule: linear-quadratic",
    "solver: euler",
    "guidance: 7.5",
    "seed: 0",
    "every: 0",
)  # its defaults


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Of every value in nested mappings and lists of mappings."""
    inside: Any = value
    if isinstance(value, list) and value and isinstance(value[0], dict):
        inside = dict(enumerate(value))
    if not isinstance(inside, dict):
        return [path]
    return [found for key, item in inside.items() for found in places(item, (*path, key))]


def test_no_key_is_left_out(values: dict[str, Any]) -> None:
    """Whatever a recipe has: one value that was another gives one line, with its key and both values."""
    config = check_config(in_two_buckets(values) | {"sample": {"scenes": ["left"]}, "cluster": "local-cpu"}, "test")
    now = recorded(config)
    found = places(now)
    sections = {f.name for f in fields(Config)} - {"kernels"}  # empty
    assert {path[0] for path in found} == sections and len(found) > 60
    assert {path[1] for path in found if path[0] == "plan"} == {f.name for f in fields(Plan)}
    assert differences({RECIPE: now}, config) == []
    for path in found:
        then = copy.deepcopy(now)
        section: Any = then
        for name in path[:-1]:
            section = section[name]
        was, section[path[-1]] = section[path[-1]], "another"
        shown = "absent" if was is None else f"[{', '.join(map(str, was))}]" if isinstance(was, list) else str(was)
        told = [str(difference) for difference in differences({RECIPE: then}, config)]
        assert told == [f"{'.'.join(map(str, path))}: another -> {shown}"]


@pytest.mark.parametrize(
    ("changed", "lines"),
    [
        ({"kernels": {"all": "reference"}}, ["kernels.all: absent -> reference"]),
        ({"plan": {"dtype": "float32", "recompute": "none", "tp": 2}}, ["plan.tp: 1 -> 2"]),
        ({"sample": None}, [f"sample.{key} -> absent" for key in SAMPLED]),
        (
            {"data": {"buckets": [{}, {"width": 64}]}},
            [f"data.buckets.1.{w}" for w in ("width: absent -> 64", "weight: absent -> 1.0")],
        ),
    ],
)
def test_what_comes_and_goes_is_told(values: dict[str, Any], changed: dict[str, Any], lines: list[str]) -> None:
    before = values | {"sample": {}}
    after = {**before, **changed, "data": {**before["data"], **changed.get("data", {})}}
    told = differences({RECIPE: recorded(check_config(before, "test"))}, check_config(after, "test"))
    assert [str(difference) for difference in told] == lines
