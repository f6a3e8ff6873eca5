"""When a record ran, measured or predicted: what traces, pictures and summaries are made of (torch-free)."""

from __future__ import annotations

from dataclasses import dataclass

from .records import NOWHERE, Op, Place


@dataclass(frozen=True, slots=True)
class Span:
    """One record. Times are seconds on one clock.

    ``lane`` is ``compute`` or the communicator. A collective could have started at ``issued_s``, runs from ``start_s``
    to ``end_s`` beside compute, and ``waited_s`` is how long compute stood still at its wait; of compute, ``issued_s``
    is ``start_s`` and ``waited_s`` 0. ``label``: the record within its place; ``place``, ``clone``: as in ``Op``.
    """

    name: str
    kind: str
    lane: str
    issued_s: float
    start_s: float
    end_s: float
    waited_s: float = 0.0
    label: str = ""
    place: Place = NOWHERE
    clone: bool = False

    @classmethod
    def of(
        cls, op: Op, lane: str, start_s: float, end_s: float, *, issued_s: float | None = None, waited_s: float = 0.0
    ) -> Span:
        """The span of a record on one of its lanes."""
        issued_s = start_s if issued_s is None else issued_s
        return cls(op.name, op.kind, lane, issued_s, start_s, end_s, waited_s, op.label, op.place, op.clone)

    @property
    def ran_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def exposed_s(self) -> float:
        """Of its run, what compute waited for."""
        return min(self.waited_s, self.ran_s)


def role(record: Span | Op) -> str:
    """Under what records of all blocks and micro-batches are summed, as ``blocks.*.forward/kv_gathered~``."""
    return f"{record.place.alike}/{record.label}{'~' if record.clone else ''}"
