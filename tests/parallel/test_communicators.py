"""A rank holds a communicator for every collective that it runs, and none that it does not."""

from __future__ import annotations

import pytest

from cinemesh.launch.verify import small_case
from cinemesh.model.step import build_step, prepare
from cinemesh.parallel.communicators import communicator, communicator_bytes, communicators
from cinemesh.parallel.plan import Plan


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("tp=1", 0),
        ("tp=2", 3),
        ("cp=2,kv_slices=3", 5),
        ("dp_replicate=2", 2),
        ("tp=2,cp=2,dp_shard=2,dp_replicate=2", 7),
    ],
)
def test_communicators_are_those_that_the_step_uses(text: str, count: int) -> None:
    case = small_case(Plan.parse(text, dtype="float32"), max_procs=16)
    program = prepare(build_step(case.config, case.plan, case.batch), backend="nccl")
    used = {communicator(op): case.plan.size(op.axes) for op in program.ops if "axes" in op.attrs and op.kind != "wait"}
    held = communicators(case.plan)
    assert {one.name: one.ranks for one in held} == used
    assert len(held) == count and communicator_bytes(case.plan, 3) == 3 * count


def test_communicators_of_the_paper_plan_at_6144_ranks() -> None:
    held = {one.name: one.ranks for one in communicators(Plan(tp=4, cp=2, dp_shard=768))}
    assert held == {
        "tp": 4,
        "cp": 2,
        "dp_shard*cp:all_gather": 1536,
        "dp_shard*cp:reduce_scatter": 1536,
        "dp_shard*cp*tp": 6144,
        "dp_replicate*dp_shard*cp*tp": 6144,
    }
