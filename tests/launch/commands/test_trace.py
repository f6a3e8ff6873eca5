"""The command writes a trace that a viewer can open, and refuses what cannot run here."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from trace_format import overlaps, tracks

from cinemesh.errors import CinemeshError
from cinemesh.launch.commands import trace
from cinemesh.launch.models import read_model
from cinemesh.launch.proof.parity import Case
from cinemesh.parallel.ir.plan import Plan
from cinemesh.perf_model.clusters.cluster import load
from cinemesh.perf_model.report.trace import predicted


def test_a_trace_of_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "trace.json"
    trace.run(plan="dp_shard=2", model="tiny", out=out, steps=2, max_procs=8, cluster="local-cpu", as_json=False)
    events = json.loads(out.read_text())["traceEvents"]
    processes = [event["args"]["name"] for event in events if event.get("name") == "process_name"]
    assert processes == ["rank 0, measured", "rank 1, measured", "predicted"]
    ran = [event for event in events if event["ph"] == "X" and event["cat"] != "wait"]
    gathers = [{e["name"] for e in ran if e["pid"] == pid and e["cat"] == "all_gather"} for pid in range(3)]
    assert gathers[0] and gathers[0] == gathers[1] == gathers[2], "predicted and measured are of one program"
    assert min(event["ts"] for event in ran) == 0
    said = capsys.readouterr().out
    assert "blocks.*.weights/flat" in said.replace("\n", "") and "compute hid" in said and "measured" in said
    assert "predicted by local-cpu" in said and "placeholders" in said
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_a_recording_of_what_was_predicted_is_told_as_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Two predicted steps, from the fifth second on: every mean of them is what was predicted beside it."""
    named, cluster = read_model("tiny"), load("local-cpu")
    case = Case(Plan.parse("tp=2,dp_shard=2,dtype=float32"), named.config, 1, named.latent(), 1)
    whole = trace.predict(case, cluster)
    step = predicted(whole)
    step_s = max(span.end_s for span in step)
    recording = [
        replace(span, **{moment: getattr(span, moment) + after_s for moment in ("issued_s", "start_s", "end_s")})
        for after_s in (5.0, 5.0 + step_s)
        for span in step
    ]
    trace._show(recording, whole, cluster, 2)
    heading, placeholders, columns, *rows, end = capsys.readouterr().out.splitlines()
    took, would_take = re.findall(r"([0-9.]+) ms", heading)
    assert float(took) == pytest.approx(step_s * 1e3, abs=0.06) and took == would_take
    assert "placeholders" in placeholders and columns.startswith("collective, ms a step")
    assert len(rows) == len(trace.predicted_rows(whole))
    for row in rows:
        _, _, count, ran, would_run, overlapped, exposed, would_wait = row.rsplit(maxsplit=7)
        assert int(count) >= 1 and (ran, exposed) == (would_run, would_wait) and float(ran) > 0
        assert float(overlapped) + float(exposed) == pytest.approx(float(ran), abs=0.011)
    hid, exposed, would_wait = re.findall(r"([0-9.]+)%", end)
    assert exposed == would_wait and 0 < float(hid) < 100


@pytest.mark.parametrize(
    ("plan", "communicators"),
    [
        ("dp_shard=2,prefetch=2,grad_units=2", ["dp_shard*cp:all_gather", "dp_shard*cp:reduce_scatter"]),
        ("cp=2,kv_slices=2,grad_units=2", ["cp", "dp_shard*cp:all_gather", "dp_shard*cp:reduce_scatter"]),
        ("tp=2,micro_batches=2", ["tp"]),
        ("tp=2,dp_replicate=2", ["tp", "dp_replicate"]),
    ],
)
def test_measured_and_predicted_can_be_laid_side_by_side(plan: str, communicators: list[str], tmp_path: Path) -> None:
    """One track a communicator, the same in all, and the format's rules.

    Gathers and reductions of units shared one in a recording, waits were drawn over compute that had run before, and
    what a viewer does with slices that overlap is its own affair.
    """
    out = tmp_path / "trace.json"
    trace.run(plan=plan, model="tiny", out=out, steps=2, max_procs=4, cluster="local-cpu", as_json=False)
    events = json.loads(out.read_text())["traceEvents"]
    first, *others = tracks(events).values()
    assert all(names == first for names in others) and first[0] == "compute"
    assert [name for name in first[1:] if name in communicators] == communicators
    assert overlaps(events) == []
    used = [{e["tid"] for e in events if e["ph"] == "X" and e["pid"] == pid} for pid in tracks(events)]
    assert all(tids == used[0] for tids in used), "a track that only some processes use"


def test_overlapping_slices_are_found() -> None:
    """Planted: the rule of the format is what the test above stands on."""
    events = [{"ph": "X", "name": n, "pid": 0, "tid": 0, "ts": ts, "dur": d} for n, ts, d in
              (("a", 0.0, 10.0), ("in a", 2.0, 8.0), ("b", 10.0, 5.0), ("over b", 14.999, 1.0))]  # fmt: skip
    assert [(a["name"], b["name"]) for a, b in overlaps(events)] == [("b", "over b")]


def test_predicted_collectives_stand_beside_measured_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace.run(
        plan="dp_shard=2",
        model="tiny",
        out=tmp_path / "t.json",
        steps=2,
        max_procs=2,
        cluster="local-cpu",
        as_json=True,
    )
    answer = json.loads(capsys.readouterr().out)
    one_step = [span for span in answer["predicted"] if span["lane"] != "compute"]
    predicted_s = sum(row["predicted_ran_s"] for row in answer["collectives"])
    assert predicted_s == pytest.approx(2 * sum(span["end_s"] - span["start_s"] for span in one_step))
    assert len(one_step) * 2 == sum(row["count"] for row in answer["collectives"])


def test_spans_are_given_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace.run(
        plan="tp=1", model="tiny", out=tmp_path / "t.json", steps=1, max_procs=1, cluster="local-cpu", as_json=True
    )
    answer = json.loads(capsys.readouterr().out)
    assert answer["collectives"] == [] and {"name", "issued_s", "waited_s"} <= answer["spans"][0][0].keys()


def test_a_plan_too_large_for_this_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CinemeshError, match=r"dp_shard\(4\) = 8 processes > --max-procs 4"):
        trace.run(
            plan="tp=2,dp_shard=4",
            model="tiny",
            out=tmp_path / "t",
            steps=1,
            max_procs=4,
            cluster="local-cpu",
            as_json=False,
        )
    with pytest.raises(CinemeshError, match="has GPUs"):
        trace.run(
            plan="tp=2", model="tiny", out=tmp_path / "t", steps=1, max_procs=8, cluster="dgx-h100-ib400", as_json=False
        )
    with pytest.raises(CinemeshError, match="heads"):
        trace.run(
            plan="tp=5", model="tiny", out=tmp_path / "t", steps=1, max_procs=8, cluster="local-cpu", as_json=False
        )
