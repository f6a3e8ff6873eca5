"""The flight recorder in a hang's verdict: who issued fewer collectives, of which communicator. JSON, no pickle."""

from __future__ import annotations

import json
import os
import pickle
from typing import Any

import pytest
import torch

from cinemesh.errors import CinemeshError
from cinemesh.launch.cluster.flight import BUFFER, CommunicatorState, FlightRecorder, joined_flights, read_flight
from cinemesh.launch.cluster.processes import forked
from cinemesh.parallel.ir.plan import Plan
from cinemesh.parallel.runtime.mesh import Mesh

PLAN = Plan(tp=2, dp_shard=2)


def dump(*groups: tuple[str, int, int, str]) -> dict[str, Any]:
    """As torch 2.13 writes it (``_dump_nccl_trace_json``): description, issued, finished and the kind of the last."""
    entries = [
        {
            **{"collective_seq_id": n + 1, "is_p2p": False, "op_id": n + 1, "p2p_seq_id": 0, "pg_id": number},
            **{"input_dtypes": ["BFloat16"], "input_sizes": [[64]], "output_sizes": [[128]], "record_id": n},
            "process_group": [f"{number:040x}", name],
            "profiling_name": f"nccl:{kind}",
            "state": "completed" if n < finished else "started",
        }
        for number, (name, issued, finished, kind) in enumerate(groups)
        for n in range(max(0, issued - 3), issued)
    ]
    status = {
        str(number): {
            "last_enqueued_collective": str(issued),
            "last_started_collective": str(issued),
            "last_completed_collective": str(finished),
        }
        for number, (_, issued, finished, _) in enumerate(groups)
    }
    return {"version": "2.10", "entries": entries, "pg_config": {}, "pg_status": status, "nccl_comm_state": {}}


def test_a_dump_is_read_by_communicator() -> None:
    text = json.dumps(dump(("tp", 40, 39, "all_gather"), ("dp_shard:reduce_scatter", 7, 7, "reduce_scatter")))
    assert read_flight(text) == {
        "tp": CommunicatorState(40, 39, "all_gather"),
        "dp_shard:reduce_scatter": CommunicatorState(7, 7, "reduce_scatter"),
    }


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"entries": [{}], "pg_status": {}}', '{"entries": 3, "pg_status": 4}']
)
def test_what_is_no_dump_is_refused_and_a_pickle_is_never_opened(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object) -> None:
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(pickle, "loads", opened)
    with pytest.raises(CinemeshError):
        read_flight(text)
    recorder = FlightRecorder.made()
    os.pwrite(recorder.answer.fileno(), text.encode() + b"\n", 0)
    assert recorder.ask(1.0) == {}
    recorder.close()


def test_the_rank_that_issued_fewer_is_told_with_the_communicator() -> None:
    """Ranks 0, 1 and 2, 3 are tp groups: what other groups have issued is not compared with theirs."""
    flights = {
        0: {"tp": CommunicatorState(40, 39, "all_gather")},
        1: {"tp": CommunicatorState(39, 39, "all_gather")},
        2: {"tp": CommunicatorState(12, 12, "all_reduce")},
        3: {"tp": CommunicatorState(12, 12, "all_reduce")},
    }
    said = "flight recorder: rank 1 issued 39 collectives of tp, and rank 0 40, the last of them all_gather"
    assert joined_flights(flights, PLAN) == said
    flights[1] = {"tp": CommunicatorState(40, 40, "all_gather")}
    assert joined_flights(flights, PLAN) == "flight recorder: rank 0 finished 39 of 40 collectives of tp, others all"
    flights[0] = flights[1]
    assert joined_flights(flights, PLAN) == "" == joined_flights({}, PLAN)


def recorded() -> dict[str, CommunicatorState]:
    """One rank of four: its own recorder's dump, asked as a watchdog asks."""
    mesh = Mesh(PLAN)
    group = mesh.group(("tp",), "all_reduce")
    for _ in range(3 if mesh.rank != 1 else 2):
        work = group.allreduce([torch.ones(4)])
        if mesh.rank > 1:
            work.wait()
    recorder = FlightRecorder.made()
    recorder.listen()
    found = recorder.ask(20.0)
    recorder.close()
    if mesh.rank == 1:
        group.allreduce([torch.ones(4)]).wait()
    mesh.close()
    return found


def test_the_recorder_of_this_torch_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo's, of real processes: rank 1 has issued one collective fewer than rank 0."""
    monkeypatch.setenv(BUFFER, "200")
    found = forked(4, recorded)
    assert [of["tp"].issued for of in found] == [3, 2, 3, 3] and found[0]["tp"].last == "all_reduce"
    told = joined_flights(dict(enumerate(found)), PLAN)
    assert "rank 1 issued 2 collectives of tp, and rank 0 3, the last of them all_reduce" in told
