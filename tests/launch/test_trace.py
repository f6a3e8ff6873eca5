"""The command writes a trace that a viewer can open, and refuses what cannot run here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cinemesh.errors import CinemeshError
from cinemesh.launch import trace


def test_a_trace_of_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "trace.json"
    trace.run(plan="dp_shard=2", model="tiny", out=out, steps=2, max_procs=8, as_json=False)
    events = json.loads(out.read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    assert {e["args"]["name"] for e in events if e.get("name") == "thread_name"} >= {"compute", "dp_shard*cp"}
    said = capsys.readouterr().out
    assert "blocks.*.weights/flat" in said.replace("\n", "") and "compute hid" in said and "measured" in said
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_spans_are_given_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace.run(plan="tp=1", model="tiny", out=tmp_path / "t.json", steps=1, max_procs=1, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["collectives"] == [] and {"name", "issued_s", "waited_s"} <= answer["spans"][0][0].keys()


def test_a_plan_too_large_for_this_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CinemeshError, match=r"dp_shard\(4\) = 8 processes > --max-procs 4"):
        trace.run(plan="tp=2,dp_shard=4", model="tiny", out=tmp_path / "t", steps=1, max_procs=4, as_json=False)
    with pytest.raises(CinemeshError, match="heads"):
        trace.run(plan="tp=5", model="tiny", out=tmp_path / "t", steps=1, max_procs=8, as_json=False)
