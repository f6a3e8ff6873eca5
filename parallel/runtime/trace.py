"""What a step did and when: every op and collective, when it was issued, ran and was waited for.

The spans come from running a bound program record by record beside its executor, so that a step that is not traced pays
nothing. Times are seconds of the machine's monotonic clock: processes of one machine share it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ...kernels.ops import OPS
from ..ir.communicators import communicator
from ..ir.records import COMPUTE_LANE, Op
from ..ir.span import Span
from .executor import Executor


@torch.no_grad()
def traced_step(executor: Executor) -> list[Span]:
    """Run one step on a CPU; spans in the order of their records, collectives at their issue."""
    assert executor.device == "cpu", "on a GPU the host does not see when an op runs"
    now = time.perf_counter
    done: list[Span | None] = []
    issued: dict[str, tuple[int, float, dist.Work, list[float]]] = {}  # record, when, what, and when it ended
    free: dict[str, float] = {}  # when each communicator ended its last collective
    records = [part for record in executor.records for part in record.parts or (record,)]
    for record in records:
        op, start = record.op, now()
        if op.kind in OPS or op.to is not None:  # a copy to or from the host is done when it is issued
            record.run()
            done.append(Span.of(op, COMPUTE_LANE if op.kind in OPS or op.is_wait else op.lane, start, now()))
        elif not op.is_wait:
            work, ended = record.run(), list[float]()
            assert isinstance(work, dist.Work)
            work.get_future().add_done_callback(lambda _, ended=ended: ended.append(now()))
            issued[op.name] = (len(done), start, work, ended)
            done.append(None)
        else:
            place, since, work, ended = issued.pop(op.waits_for)
            work.wait()
            waited = now()
            record.run()  # what is left of it: on gloo, the sum of a reduce-scatter
            issue = records[place].op
            end = min(ended[0], waited) if ended else waited
            lane = communicator(issue)
            begin = min(max(since, free.get(lane, since)), end)
            free[lane] = max(end, free.get(lane, end))
            done[place] = Span.of(issue, lane, begin, end, issued_s=since, waited_s=waited - start)
            done.append(Span.of(op, COMPUTE_LANE, start, now()))
    return [span for span in done if span is not None]


@dataclass(frozen=True)
class OverlapRow:
    """Collectives of one role, of all layers and steps: totals in seconds."""

    role: str
    kind: str
    lane: str
    count: int
    ran_s: float
    overlapped_s: float
    exposed_s: float


def summary(spans: Sequence[Span]) -> list[OverlapRow]:
    """Overlapped and exposed time of every collective, layers and micro-batches together; the most exposed first."""
    groups: dict[tuple[str, str, str], list[Span]] = {}
    for span in spans:
        if span.lane != COMPUTE_LANE:
            groups.setdefault((role(span), span.kind, span.lane), []).append(span)
    rows = [
        OverlapRow(
            *key,
            len(group),
            sum(s.ran_s for s in group),
            sum(s.overlapped_s for s in group),
            sum(s.exposed_s for s in group),
        )
        for key, group in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.exposed_s)


def role(record: Span | Op) -> str:
    """Under what records of all blocks and micro-batches are summed, as ``blocks.*.forward/kv_gathered~``."""
    return f"{record.place.alike}/{record.label}{'~' if record.clone else ''}"
