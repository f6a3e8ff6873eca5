"""The start rule and contention, on tapes small enough to be played by hand.

Only these tests catch a lane that starts too early (a hidden exposure that no runtime gives) or a shared link counted
as two. Times are multiples of powers of two, so sums are exact and comparisons need no tolerance but rounding's.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.parallel.ir.nccl_stack import NcclStack
from cinemesh.parallel.ir.plan import Plan
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.prices.models import PriceModels
from cinemesh.perf_model.prices.network import Cost
from cinemesh.perf_model.prices.played import play_step
from cinemesh.perf_model.prices.timeline import COMPUTE, ISSUE, WAIT, Record, Tape, play

EXACT = 1e-12  # seconds of rounding over a few dozen additions


def cost(transfer_s: float, latency_s: float = 0.0, link: str = "nvlink", sms: int = 0, memory: float = 0.0) -> Cost:
    return Cost(latency_s, transfer_s, link, sms, memory, "ring", "Simple")


def tape(*records: Record, slowdown: float = 1.0, beside: float = 1.0) -> Tape:
    return Tape(list(records), 100, 1e12, slowdown, beside)


def compute(seconds: float, needs_sms: bool = True, leaves: int = 0) -> Record:
    return Record(COMPUTE, seconds, needs_sms, leaves=leaves)


def issue(communicator: int, what: Cost, late: bool = False, copies: bool = False) -> Record:
    return Record(ISSUE, key=communicator, cost=what, late=late, copies=copies)


def wait(index: int) -> Record:
    return Record(WAIT, key=index)


def test_a_wait_right_after_its_issue_exposes_everything() -> None:
    played = play(tape(compute(1.0), issue(0, cost(2.0, latency_s=0.5)), wait(1), compute(1.0)))
    assert played.step_s == pytest.approx(4.5, abs=EXACT)
    assert played.exposed_s == {1: pytest.approx(2.5, abs=EXACT)}


def test_compute_between_issue_and_wait_hides() -> None:
    played = play(tape(issue(0, cost(2.0)), compute(1.5), wait(0), compute(1.0)))
    assert played.exposed_s[0] == pytest.approx(0.5, abs=EXACT)
    assert played.step_s == pytest.approx(3.0, abs=EXACT)


def test_one_communicator_runs_one_collective_after_the_other() -> None:
    played = play(tape(issue(0, cost(1.0)), issue(0, cost(1.0, link="nic")), wait(0), wait(1)))
    assert played.start[1] == pytest.approx(1.0, abs=EXACT)
    assert played.step_s == pytest.approx(2.0, abs=EXACT)


def test_a_collective_starts_after_the_start_of_every_earlier_issue() -> None:
    """Rule (c): the third is on a free communicator, but the second, issued before it, has not started."""
    played = play(
        tape(issue(0, cost(1.0)), issue(0, cost(1.0)), issue(1, cost(1.0, link="nic")), wait(0), wait(1), wait(2))
    )
    assert played.start[2] == pytest.approx(1.0, abs=EXACT)


def test_a_copy_to_the_host_is_in_no_order_with_collectives() -> None:
    """The second collective has not started; the copy issued behind it does, and holds back nothing itself.

    Two copies of one way run one after the other. Rule (c) for them would expose what the copy engines hide.
    """
    away = cost(4.0, link="to_host")
    records = (issue(0, cost(1.0)), issue(0, cost(1.0)), issue(1, away, copies=True), issue(1, away, copies=True))
    played = play(tape(*records, issue(2, cost(1.0, link="nic")), wait(4), wait(0), wait(1), wait(2), wait(3)))
    assert [played.start[i] for i in (2, 3, 4)] == pytest.approx([0.0, 4.0, 1.0], abs=EXACT)
    assert played.step_s == pytest.approx(8.0, abs=EXACT)


def test_a_copy_shares_the_bus_that_the_nic_is_on() -> None:
    played = play(tape(issue(0, cost(1.0, link="nic")), issue(1, cost(1.0, link="nic"), copies=True), wait(0), wait(1)))
    assert played.end[0] == played.end[1] == pytest.approx(2.0, abs=EXACT)


def test_two_collectives_on_one_link_share_it() -> None:
    played = play(tape(issue(0, cost(1.0)), issue(1, cost(1.0)), wait(0), wait(1)))
    assert played.end[0] == played.end[1] == pytest.approx(2.0, abs=EXACT)
    apart = play(tape(issue(0, cost(1.0)), issue(1, cost(1.0, link="nic")), wait(0), wait(1)))
    assert apart.step_s == pytest.approx(1.0, abs=EXACT)


def test_latency_is_not_shared() -> None:
    played = play(tape(issue(0, cost(0.0, latency_s=1.0)), issue(1, cost(0.0, latency_s=1.0)), wait(0), wait(1)))
    assert played.step_s == pytest.approx(1.0, abs=EXACT)


def test_channels_take_sms_from_compute_and_traffic_takes_bandwidth() -> None:
    """20 of 100 SMs held for 1 s: 0.8 s of work is done meanwhile; memory-bound work loses half its bandwidth."""
    held = cost(1.0, sms=20, memory=0.5e12)
    assert play(tape(issue(0, held), compute(1.0), wait(0))).step_s == pytest.approx(1.2, abs=EXACT)
    assert play(tape(issue(0, held), compute(1.0, False), wait(0))).step_s == pytest.approx(1.5, abs=EXACT)


def test_collectives_slow_down_beside_compute() -> None:
    played = play(tape(issue(0, cost(1.0)), compute(4.0), wait(0), beside=1.25))
    assert played.end[0] == pytest.approx(1.25, abs=EXACT)


def test_without_priority_a_collective_waits_for_the_record_that_runs() -> None:
    """Its turn comes after 1 s of a record of 2.5 s: with priority it starts there, without at the record's end."""
    for late, start in ((False, 1.0), (True, 2.5)):
        first, second = issue(0, cost(1.0)), issue(0, cost(1.0, sms=1), late)
        played = play(tape(first, second, compute(2.5), compute(4.0), wait(0), wait(1), slowdown=0.0))
        assert played.start[1] == pytest.approx(start, abs=EXACT)
        assert played.end[1] == pytest.approx(start + 1.0, abs=EXACT)


def test_without_priority_a_collective_starts_at_once_where_nothing_computes() -> None:
    played = play(tape(compute(1.0), issue(0, cost(1.0), late=True), compute(2.0), wait(1)))
    assert played.start[1] == pytest.approx(1.0, abs=EXACT)
    behind = play(tape(issue(0, cost(1.0)), issue(0, cost(1.0), late=True), wait(0), wait(1)))
    assert behind.start[1] == pytest.approx(1.0, abs=EXACT)


def test_what_was_issued_later_waits_with_it() -> None:
    """Rule (c): the third has priority and a communicator of its own, but the second has not started."""
    late = issue(0, cost(1.0, sms=1), late=True)
    made = tape(issue(0, cost(1.0)), late, issue(1, cost(1.0, link="nic")), compute(3.0), wait(2), slowdown=0.0)
    assert play(made).start[2] == pytest.approx(3.0, abs=EXACT)


@pytest.mark.parametrize(("leaves", "start"), [(9, 3.0), (10, 1.0)])
def test_a_margin_as_wide_as_its_blocks_lets_it_start(leaves: int, start: float) -> None:
    """6 of 100 SMs are in flight and stay so; 4 more need a margin of 10 in all."""
    flying, turn = cost(8.0, link="nic", sms=6), cost(1.0, sms=4)
    made = tape(
        issue(1, flying), issue(0, cost(1.0)), issue(0, turn, True), compute(3.0, leaves=leaves), wait(0), wait(2)
    )
    assert play(made).start[2] == pytest.approx(start, abs=1e-9)


def test_compute_loses_only_the_sms_beyond_those_it_left() -> None:
    """20 of 100 SMs are held. 20 left: nothing is lost. 10 left: 10 of the other 90 go, so 0.9 s need 1.0125 s."""
    held = cost(1.0, sms=20, memory=0.5e12)
    assert play(tape(issue(0, held), compute(0.9, leaves=20), wait(0))).end[1] == pytest.approx(0.9, abs=EXACT)
    assert play(tape(issue(0, held), compute(0.9, leaves=10), wait(0))).end[1] == pytest.approx(
        1.0 + 0.1 / 9, abs=EXACT
    )
    assert play(tape(issue(0, held), compute(1.0, False, leaves=20), wait(0))).step_s == pytest.approx(1.5, abs=EXACT)


def test_a_wait_for_what_was_never_issued_is_refused() -> None:
    with pytest.raises(ValueError, match="never starts"):
        play(tape(compute(1.0), wait(0)))


@st.composite
def tapes(draw: st.DrawFn) -> Tape:
    """Any order of compute, issues on three communicators and two links, and their waits."""
    records: list[Record] = []
    pending: list[int] = []
    for _ in range(draw(st.integers(1, 20))):
        what = draw(st.sampled_from((COMPUTE, ISSUE, WAIT)))
        if what == COMPUTE:
            leaves = draw(st.sampled_from((0, 0, 8, 30)))
            records.append(compute(draw(st.floats(0.0, 2.0)), draw(st.booleans()), leaves))
        elif what == ISSUE:
            pending.append(len(records))
            link = draw(st.sampled_from(("nvlink", "nic")))
            made = cost(draw(st.floats(0.0, 2.0)), draw(st.floats(0.0, 0.5)), link, draw(st.integers(0, 30)), 0.1e12)
            records.append(issue(draw(st.integers(0, 2)), made, draw(st.booleans())))
        elif pending:
            records.append(wait(pending.pop(draw(st.integers(0, len(pending) - 1)))))
    return tape(*records, *(wait(i) for i in pending), beside=1.1)


@settings(max_examples=200, deadline=None)
@given(tapes())
def test_no_step_is_shorter_than_its_compute_or_any_lane(made: Tape) -> None:
    played = play(made)
    lanes: dict[int, float] = {}
    for i, record in enumerate(made.records):
        if record.kind == ISSUE:
            lanes[record.key] = lanes.get(record.key, 0.0) + record.cost.seconds
            assert played.end[i] - played.start[i] >= record.cost.seconds - EXACT
        elif record.kind == WAIT:
            assert played.end[i] >= played.end[record.key] - EXACT
    assert played.step_s >= max(made.compute_s, *lanes.values(), 0.0) - 1e-9
    assert played.step_s == pytest.approx(played.compute_busy_s + played.total_exposed_s, abs=1e-9)
    issued = [played.start[i] for i, record in enumerate(made.records) if record.kind == ISSUE]
    assert issued == sorted(issued)  # rule (c)
    for i, record in enumerate(made.records):
        if record.kind == COMPUTE:
            inside = [j for j, start in enumerate(played.start) if played.start[i] < start < played.end[i]]
            for j in (j for j in inside if made.records[j].late and made.records[j].cost.seconds > 0.0):
                assert made.records[j].cost.sms <= record.leaves


# -- one at a time ----------------------------------------------------------------------------------------------------

CLUSTER = load("grand-teton-h100")
OLD_DRIVER = replace(CLUSTER, stack=NcclStack((2, 28), (12, 8)))


def one_after_another(records: list[Record]) -> float:
    """A step whose collectives cost no SMs and wait in one queue: a recurrence, nothing of the timeline's."""
    now = free = 0.0
    ends: dict[int, float] = {}
    for i, record in enumerate(records):
        if record.kind == COMPUTE:
            now += record.seconds
        elif record.kind == ISSUE:
            free = ends[i] = max(now, free) + record.cost.seconds
        else:
            now = max(now, ends[record.key])
    return max(now, free)


@pytest.mark.parametrize("text", ["tp=2,cp=2,dp_shard=2", "tp=2,cp=2,dp_shard=2,dp_replicate=2,micro_batches=2"])
def test_collectives_of_a_captured_step_on_an_old_driver_wait_in_one_queue(text: str) -> None:
    """The whole step of a small model; a driver that is not asked would price the overlap that NCCL does not give."""
    plan = Plan.parse(text)
    steps: dict[str, Tape] = {}
    for name, on in {"lost": OLD_DRIVER.capturing("required"), "kept": CLUSTER.capturing("required")}.items():
        played = play_step(preset("tiny"), plan, BatchShape(1, (2, 8, 8)), PriceModels.of(on))
        bare = {
            i: replace(r, cost=cost(0.0, r.cost.seconds), late=False)
            for i, r in enumerate(played.tape.records)
            if r.kind == ISSUE
        }
        steps[name] = played.tape.with_records(bare)
    assert play(steps["lost"]).step_s == pytest.approx(one_after_another(steps["lost"].records), rel=1e-12)
    assert play(steps["kept"]).step_s < 0.999 * play(steps["lost"]).step_s


def test_what_a_recipe_asks_decides_what_is_priced() -> None:
    """Of the four, ``auto`` on an old driver launches by the host, and keeps its overlap."""
    priced = {
        (on.stack is not None, asked): (on.capturing(asked).captured, on.capturing(asked).one_at_a_time)
        for on in (CLUSTER, OLD_DRIVER)
        for asked in ("auto", "required", "off")
    }
    assert {key for key, (captured, _) in priced.items() if not captured} == {
        (True, "auto"),
        (True, "off"),
        (False, "off"),
    }
    assert {key for key, (_, serial) in priced.items() if serial} == {(True, "required")}
    host, graph = (PriceModels.of(OLD_DRIVER.capturing(asked)).compute.launch_s for asked in ("auto", "required"))
    assert (host, graph) == (CLUSTER.launch.eager_s, CLUSTER.launch.graph_s)
