"""What a step did and when: every op and collective, when it was issued, ran and was waited for.

The spans come from running a bound program record by record beside its executor, so that a step that is not traced pays
nothing. Times are seconds of the machine's monotonic clock: processes of one machine share it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ...kernels.ops import OPS
from .executor import Executor


@dataclass(frozen=True)
class Span:
    """One record. Compute is issued when it starts; a collective runs from ``start_s`` to ``end_s`` beside it.

    ``waited_s``: how long compute stood still at its wait. ``start_s`` of a collective is not seen: it is when it was
    issued or, where that is later, when the one before it on its communicator ended.
    """

    name: str
    kind: str
    lane: str
    issued_s: float
    start_s: float
    end_s: float
    waited_s: float

    @property
    def ran_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def exposed_s(self) -> float:
        """Of its run, what compute waited for."""
        return min(self.waited_s, self.ran_s)

    @property
    def overlapped_s(self) -> float:
        """Of its run, what compute hid."""
        return self.ran_s - self.exposed_s


@torch.no_grad()
def traced_step(executor: Executor) -> list[Span]:
    """Run one step on a CPU; spans in the order of their records, collectives at their issue."""
    assert executor.device == "cpu", "on a GPU the host does not see when an op runs"
    now = time.perf_counter
    done: list[Span | None] = []
    issued: dict[str, tuple[int, float, dist.Work, list[float]]] = {}  # record, when, what, and when it ended
    free: dict[tuple[str, str], float] = {}  # when each communicator ended its last collective
    records = [part for record in executor.records for part in record.parts or (record,)]
    for record in records:
        op, start = record.op, now()
        if op.kind in OPS:
            record.run()
            done.append(Span(op.name, op.kind, op.lane, start, start, now(), 0.0))
        elif op.kind != "wait":
            work, ended = record.run(), list[float]()
            assert isinstance(work, dist.Work)
            work.get_future().add_done_callback(lambda _, ended=ended: ended.append(now()))
            issued[op.name] = (len(done), start, work, ended)
            done.append(None)
        else:
            place, since, work, ended = issued.pop(op.attrs["issue"])
            work.wait()
            waited = now()
            record.run()  # what is left of it: on gloo, the sum of a reduce-scatter
            kind = records[place].op.kind
            end = min(ended[0], waited) if ended else waited
            channel = (op.lane, kind)
            begin = min(max(since, free.get(channel, since)), end)
            free[channel] = end
            done[place] = Span(op.attrs["issue"], kind, op.lane, since, begin, end, waited - start)
            done.append(Span(op.name, "wait", "compute", start, start, now(), 0.0))
    return [span for span in done if span is not None]


@dataclass(frozen=True)
class Row:
    """Collectives of one role, of all layers and steps: totals in seconds."""

    role: str
    kind: str
    lane: str
    count: int
    ran_s: float
    overlapped_s: float
    exposed_s: float


def summary(spans: Sequence[Span]) -> list[Row]:
    """Overlapped and exposed time of every collective, layers and micro-batches together; the most exposed first."""
    groups: dict[tuple[str, str, str], list[Span]] = {}
    for span in spans:
        if span.lane != "compute":
            groups.setdefault((role(span.name), span.kind, span.lane), []).append(span)
    rows = [
        Row(
            *key,
            len(group),
            sum(s.ran_s for s in group),
            sum(s.overlapped_s for s in group),
            sum(s.exposed_s for s in group),
        )
        for key, group in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.exposed_s)


def role(name: str) -> str:
    """``mb1/blocks.7.forward/kv_gathered~`` -> ``blocks.*.forward/kv_gathered~``."""
    return re.sub(r"^mb\d+/", "", re.sub(r"blocks\.\d+\.", "blocks.*.", name))
