"""The ledger: the sequence of collectives and host copies that a step ran, against its program's (torch-free).

An entry says kind, axes, communicator, payload bytes; order counts within a lane (the axes' link, or one way of the
host's). The executor never writes it: ``comm.py`` does when it calls the collective, ``host.py`` when it copies, and
tests watch from outside. Both ask the process group which communicator it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.collectives import FUSED
from ..ir.communicators import communicator
from ..ir.program import Program


@dataclass(frozen=True)
class Entry:
    """One collective or copy. ``communicator``: the name of that on which it runs (``ir/communicators.py``)."""

    kind: str
    lane: str
    communicator: str
    payload_bytes: int

    def __str__(self) -> str:
        return f"{self.kind} on {self.communicator}, {self.payload_bytes} B"


def expected(program: Program) -> list[Entry]:
    """What one rank of the program will run. Needs neither tensors nor processes: this is the dry run's ledger."""
    sent = (op for op in program.ops if op.comm is not None and not op.is_wait)
    return [Entry(FUSED.get(op.kind, op.kind), op.lane, communicator(op), program.payload_bytes(op)) for op in sent]


def by_lane(entries: list[Entry]) -> dict[str, list[Entry]]:
    lanes: dict[str, list[Entry]] = {}
    for entry in entries:
        lanes.setdefault(entry.lane, []).append(entry)
    return lanes


def difference(ran: list[Entry], planned: list[Entry]) -> str | None:
    """The first difference in any lane, as a sentence; None when they are equal."""
    ran_lanes, planned_lanes = by_lane(ran), by_lane(planned)
    for lane in sorted({*ran_lanes, *planned_lanes}):
        got, want = ran_lanes.get(lane, []), planned_lanes.get(lane, [])
        for i, (a, b) in enumerate(zip(got, want, strict=False)):
            if a != b:
                return f"lane {lane}, collective {i}: ran {a}; the program has {b}"
        if len(got) != len(want):
            return f"lane {lane}: ran {len(got)} collectives; the program has {len(want)}"
    return None
