"""What a step did and when: every op and collective, when it was issued, ran and was waited for.

The spans come from running bound records one by one, so that a step that is not traced pays nothing; while they run
only moments are noted. Times are seconds of the machine's monotonic clock: processes of one machine share it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ...kernels.ops import OPS
from ..ir.communicators import communicator
from ..ir.records import COMPUTE_LANE, Op
from ..ir.span import Span
from .executor import BoundRecord


@torch.inference_mode()  # as a replayed step runs
def traced_step(records: Sequence[BoundRecord]) -> list[Span]:
    """Run the records of one step on a CPU; spans in their order, collectives at their issue."""
    now = time.perf_counter
    moments: list[
        tuple[float, float, list[float]]
    ] = []  # of every record: before, behind, and when what it issued ended
    for record in records:
        start, ended = now(), list[float]()
        answer = record.run()
        if isinstance(answer, dist.Work):
            answer.get_future().add_done_callback(lambda _, ended=ended: ended.append(now()))
        moments.append((start, now(), ended))
    done: list[Span | None] = []
    issued: dict[str, tuple[int, Op, float, list[float]]] = {}  # by name: record, what, when, and when it ended
    free: dict[str, float] = {}  # when each communicator ended its last collective
    for record, (start, end, ended) in zip(records, moments, strict=True):
        op = record.op
        if op.kind in OPS or op.to is not None:  # a copy to or from the host is done when it is issued
            done.append(Span.of(op, COMPUTE_LANE if op.kind in OPS or op.is_wait else op.lane, start, end))
        elif not op.is_wait:
            issued[op.name] = (len(done), op, start, ended)
            done.append(None)
        else:  # behind what it waits for, a wait does what is left of it: on gloo, the sum of a reduce-scatter
            place, issue, since, ended = issued.pop(op.waits_for)
            until = min(ended[0], end) if ended else end
            lane = communicator(issue)
            begin = min(max(since, free.get(lane, since)), until)
            free[lane] = max(until, free.get(lane, until))
            done[place] = Span.of(issue, lane, begin, until, issued_s=since, waited_s=max(until - start, 0.0))
            done.append(Span.of(op, COMPUTE_LANE, start, end))
    return [span for span in done if span is not None]
