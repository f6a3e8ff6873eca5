"""Spans and trace files, from a step whose prices are made by hand: one millisecond a record."""

import itertools
import json
from pathlib import Path

import pytest
from trace_format import overlaps, tracks

from cinemesh.files import atomic_file
from cinemesh.kernels.ops import OPS
from cinemesh.model.config import preset
from cinemesh.model.inputs import BatchShape
from cinemesh.model.step import build_step
from cinemesh.parallel.ir.communicators import communicator
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.ir.records import Phase, Place
from cinemesh.parallel.ir.span import Span
from cinemesh.parallel.passes.device_memory import Workspaces
from cinemesh.parallel.passes.pipeline import prepare
from cinemesh.perf_model.prices.footprint import Footprint, stack
from cinemesh.perf_model.prices.network import Cost
from cinemesh.perf_model.prices.played import PlayedStep
from cinemesh.perf_model.prices.timeline import COMPUTE, ISSUE, WAIT, Record, Tape, play
from cinemesh.perf_model.report.report import trace

LATENT = (2, 4, 4)


def hand_made(plan: Plan) -> PlayedStep:
    """The tiny model's step with hand-made prices: compute 1 ms a record, collectives 2 ms, those of units 30 ms."""
    config, batch = preset("tiny"), BatchShape(1, LATENT)
    program = prepare(build_step(config, plan, batch), backend="nccl")
    records: list[Record] = []
    at: dict[str, int] = {}
    communicators: dict[str, int] = {}
    for i, op in enumerate(program.ops):
        if op.is_wait:
            records.append(Record(WAIT, key=at[op.waits_for]))
        elif op.kind in OPS:
            records.append(Record(COMPUTE, 1e-3))
        else:
            at[op.name] = i
            key = communicators.setdefault(communicator(op), len(communicators))
            transfer_s = 3e-2 if "dp_shard" in op.axes else 2e-3
            records.append(Record(ISSUE, key=key, cost=Cost(2e-4, transfer_s, op.lane, 8, 1e11, "ring", "simple")))
    tape = Tape(records, 132, 3e12, 1.0, 1.0)
    timeline = play(tape)
    kernels = Workspaces("cpu")
    stacked = stack(program, kernels)
    peak = max(stacked.total)
    at_peak = stacked.total.index(peak)
    by_class = {name: values[at_peak] for name, values in stacked.by_class.items()} | {"NCCL": 2**20}
    print_of = Footprint(sum(by_class.values()), by_class, program.ops[at_peak].name, 2.0 * peak)
    return PlayedStep(plan, batch, program, tape, timeline, print_of, kernels, timeline.step_s)


@pytest.fixture(scope="module")
def whole() -> PlayedStep:
    return hand_made(Plan(tp=2, cp=2, dp_shard=2, dtype="float32", prefetch=2))


def test_spans_hold_the_whole_timeline(whole: PlayedStep) -> None:
    """Nothing is lost or told twice: busy time of compute, and the exposed time."""
    spans = trace.predicted(whole)
    compute = sum(span.end_s - span.start_s for span in spans if span.lane == trace.COMPUTE)
    assert compute == pytest.approx(whole.timeline.compute_busy_s)
    assert sum(span.waited_s for span in spans) == pytest.approx(whole.timeline.total_exposed_s)
    assert len(spans) == sum(not op.is_wait for op in whole.program.ops)


def test_waits_lie_where_compute_stands_still(whole: PlayedStep) -> None:
    """Waits are derived (they end with their collective); a wrong end would overlap compute or leave the lane idle."""
    spans = trace.predicted(whole)
    lane = sorted(
        (*trace.waits(spans), *(span for span in spans if span.lane == trace.COMPUTE)), key=lambda span: span.start_s
    )
    assert trace.waits(spans)
    for before, after in itertools.pairwise(lane):
        assert after.start_s == pytest.approx(before.end_s, abs=1e-12)


def test_collectives_start_after_their_issue(whole: PlayedStep) -> None:
    spans = [span for span in trace.predicted(whole) if span.lane != trace.COMPUTE]
    assert all(span.issued_s <= span.start_s + 1e-12 for span in spans)
    assert any(span.issued_s < span.start_s - 1e-6 for span in spans), "nothing queued: the test would show nothing"


def test_lanes_are_named_as_in_the_program(whole: PlayedStep) -> None:
    assert trace.lanes(trace.predicted(whole)) == [
        "compute",
        "tp",
        "cp",
        "dp_shard*cp:all_gather",
        "dp_shard*cp:reduce_scatter",
        "dp_shard*cp*tp",
        "dp_replicate*dp_shard*cp*tp",
    ]


def test_block_windows_follow_each_other(whole: PlayedStep) -> None:
    """Forward goes up, backward goes down, and a window with its recompute begins before its first gradient."""
    spans = trace.predicted(whole)
    first, second = (trace.block_window(spans, block, Phase.FORWARD) for block in (0, 1))
    assert first[1] == second[0] < second[1]
    later, earlier = (trace.block_window(spans, block, Phase.BACKWARD) for block in (1, 0))
    assert second[1] <= later[0] < later[1] == earlier[0]
    made = Place(Phase.FORWARD, micro_batch=0, block=1, unit="blocks.1")
    again = next(span for span in spans if span.place == made and span.clone)
    assert later[0] <= again.start_s < later[1]
    with pytest.raises(ValueError, match="block 99"):
        trace.block_window(spans, 99, Phase.FORWARD)


def test_memory_samples_keep_the_peak(whole: PlayedStep) -> None:
    """However few the samples."""
    stacked = whole.stack
    for points in (1, 3, 1000):
        kept = trace.highest(whole, stacked, points)
        assert max(stacked.total[i] for i, _ in kept) == max(stacked.total)
        assert len(kept) <= points + 1
        assert kept == sorted(kept)


def test_chrome_trace(whole: PlayedStep, tmp_path: Path) -> None:
    """What Perfetto needs: a named thread for each lane, microseconds, and slices of a thread that nest."""
    spans = trace.predicted(whole)
    path = tmp_path / "step.json"
    trace.write(path, {"predicted": [*spans, *trace.waits(spans)]}, whole)
    events = json.loads(path.read_text())["traceEvents"]
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(threads.values()) == trace.lanes(spans)
    bars = [e for e in events if e["ph"] == "X"]
    assert overlaps(events) == []
    assert max(e["ts"] + e["dur"] for e in bars) == pytest.approx(whole.timeline.step_s * 1e6)
    counters = [e for e in events if e["ph"] == "C"]
    assert max(sum(e["args"].values()) for e in counters) == pytest.approx(max(whole.stack.total) / 1e9)
    assert [p.name for p in tmp_path.iterdir()] == ["step.json"]


def test_measured_spans_stand_beside_predicted_ones() -> None:
    """A recording is written as a process of its own."""
    measured = Span("mb0/y", "all_gather", "tp", issued_s=1.0, start_s=1.5, end_s=2.0, waited_s=0.25)
    wait = Span("mb0/y.wait", "wait", "compute", 1.8, 1.8, 2.1)
    expected = [Span("mb0/y", "all_gather", "tp", 1.0, 1.0, 1.5), Span("mb0/z", "all_reduce", "cp", 1.0, 1.0, 1.5)]
    events = trace.chrome({"predicted": expected, "rank 3": [measured, wait]})["traceEvents"]
    bars = [e for e in events if e["ph"] == "X" and e["pid"] == 1]
    assert [(e["name"], e["tid"], e["ts"], e["dur"]) for e in bars] == [
        ("mb0/y", 1, 1.5e6, 0.5e6),
        ("mb0/y.wait", 0, 1.8e6, 0.3e6),
    ]
    assert bars[0]["args"] == {"kind": "all_gather", "queued_us": 0.5e6, "exposed_us": 0.25e6}
    assert tracks(events) == {0: ["compute", "tp", "cp"], 1: ["compute", "tp", "cp"]}, "a lane is the same track in all"


def test_an_unfinished_file_has_no_final_name(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
