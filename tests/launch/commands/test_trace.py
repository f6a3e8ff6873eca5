"""The command writes a trace that a viewer can open, and refuses what cannot run here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trace_format import overlaps, tracks

from cinemesh.errors import CinemeshError
from cinemesh.launch.commands import trace


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
    assert "blocks.*.weights/flat" in said and "dp_shard*cp:reduce_scatter" in said and "of all ranks" in said
    assert "local-cpu predicts" in said and "placeholders" in said
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


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


def test_the_same_numbers_are_given_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every record of the program in one row of each side, and what the lanes held is the step that ran."""
    options = {"model": "tiny", "out": tmp_path / "t.json", "cluster": "local-cpu", "as_json": True}
    trace.run(plan="tp=1", steps=2, max_procs=1, **options)
    told = json.loads(capsys.readouterr().out)
    assert told["plan"]["tp"] == 1 and told["steps"] == 2 and {lane["lane"] for lane in told["lanes"]} == {"compute"}
    assert sum(row["held_s"] for row in told["rows"]) == pytest.approx(told["step_s"])
    assert sum(row["predicted_held_s"] for row in told["rows"]) == pytest.approx(told["predicted_step_s"])
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    ran = [event for event in events if event["ph"] == "X" and event["pid"] == 0]
    assert 2 * sum(row["count"] for row in told["rows"]) == len(ran)


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
