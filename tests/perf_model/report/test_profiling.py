"""A profile's sums by hand, and the prediction played as if it had been measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.records import COMPUTE_LANE
from cinemesh.parallel.ir.span import Span
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.played import PlayedStep, play_step
from cinemesh.perf_model.report.profile_page import render_profile
from cinemesh.perf_model.report.profiling import StepProfile, held_by, profiled, step_seconds
from cinemesh.perf_model.report.trace import predicted, waits


def span(name: str, lane: str, issued: float, start: float, end: float) -> Span:
    return Span(name, "silu", lane, issued, start, end)


def test_what_each_record_held_is_the_step() -> None:
    """By hand: an op, a collective issued in 2, an op beside it, its wait, and what follows; with moments between."""
    spans = [
        span("a", "compute", 10.0, 10.0, 13.0),
        span("g", "tp", 13.0, 15.0, 21.0),  # the host spends 2 to issue it
        span("b", "compute", 15.0, 15.0, 19.5),  # 0.5 until its successor begins
        span("g.wait", "compute", 20.0, 20.0, 21.0),
        span("c", "compute", 21.0, 21.0, 24.0),
    ]
    assert held_by(spans) == [3.0, 2.0, 5.0, 1.0, 3.0] and step_seconds(spans) == 14.0 == sum(held_by(spans))


@pytest.fixture(scope="module")
def whole() -> PlayedStep:
    plan = Plan.parse("tp=2,dp_shard=2,prefetch=1,grad_units=2,dtype=float32")
    return play_step(preset("tiny"), plan, BatchShape(2, (2, 4, 4)), load("local-cpu"))


def as_measured(whole: PlayedStep, slower: float = 1.0) -> list[Span]:
    """The prediction as a recording has it: waits behind what they wait for, in the program's order."""
    spans = {found.name: found for found in predicted(whole)}
    behind = {found.name: found for found in waits(predicted(whole))}
    order = [found for op in whole.program.ops for found in (spans.get(op.name), _wait(op, behind)) if found]
    moments = ("issued_s", "start_s", "end_s")
    return [replace(one, **{of: slower * getattr(one, of) for of in moments}) for one in order]


def _wait(op: Any, behind: dict[str, Span]) -> Span | None:
    return (
        replace(behind[f"{op.waits_for}.wait"], name=op.name)
        if op.is_wait and f"{op.waits_for}.wait" in behind
        else None
    )


def of(whole: PlayedStep, slower: float = 1.0) -> StepProfile:
    return profiled([as_measured(whole, slower)] * 2, [slower * whole.step_s] * 2, whole)


def test_a_step_that_ran_as_predicted_has_no_disagreement(whole: PlayedStep) -> None:
    """Every record is in a row, each row's two sides agree, and the lanes sum to the step: on all of its lanes."""
    profile = of(whole)
    assert profile.accounted == pytest.approx(1.0) and profile.error == pytest.approx(0.0, abs=1e-9)
    assert profile.step_s == pytest.approx(profile.predicted_step_s) == pytest.approx(whole.step_s)
    records = [found for found in predicted(whole) if found.kind != "wait"]
    assert sum(row.count for row in profile.rows) == len(records)
    for row in profile.rows:
        assert row.ran_s == pytest.approx(row.predicted_ran_s) and row.off_s < 1e-9, row
    assert profile.lanes[0].lane == COMPUTE_LANE and len(profile.lanes) > 3
    assert sum(lane.held_s for lane in profile.lanes) == pytest.approx(whole.step_s)
    assert sum(lane.predicted_held_s for lane in profile.lanes) == pytest.approx(whole.step_s)


def test_the_worst_disagreement_comes_first(whole: PlayedStep) -> None:
    """Planted: one op of a block takes ten times as long, and all that follows is later."""
    spans = as_measured(whole)
    at = next(i for i, one in enumerate(spans) if one.label == "gate" and one.lane == COMPUTE_LANE)
    late = 9 * spans[at].ran_s
    moved = [replace(one, issued_s=one.issued_s + late, start_s=one.start_s + late, end_s=one.end_s + late)
             for one in spans[at + 1 :]]  # fmt: skip
    slow = replace(spans[at], end_s=spans[at].end_s + late)
    profile = profiled([[*spans[:at], slow, *moved]], [whole.step_s + late], whole)
    assert profile.rows[0].role.endswith(".forward/gate") and profile.rows[0].off_s == pytest.approx(late)
    assert profile.rows[1].off_s < 1e-9


def test_the_page_has_every_row_and_fetches_nothing(whole: PlayedStep) -> None:
    """Text of a recipe is escaped; the bars are as long as their numbers say."""
    page = render_profile("a <model>", load("local-cpu"), whole.plan, of(whole, 2.0), 4)
    assert "a &lt;model&gt;" in page and "<model>" not in page
    assert all(row.role in page for row in of(whole).rows) and page.count("bar measured") == len(of(whole).rows)
    assert "http" not in page and "src=" not in page and "<script" not in page
    assert 'class="bar measured" style="width: 100.00%"' in page
    assert 'class="bar predicted" style="width: 50.00%"' in page


def test_ranks_and_steps_are_averaged(whole: PlayedStep) -> None:
    both = profiled([as_measured(whole), as_measured(whole, 3.0)], [whole.step_s, 3 * whole.step_s], whole)
    assert both.step_s == pytest.approx(2 * whole.step_s) == pytest.approx(both.plain_step_s)
    assert all(row.ran_s == pytest.approx(2 * row.predicted_ran_s) for row in both.rows)
    assert both.error == pytest.approx(0.5)
