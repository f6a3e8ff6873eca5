"""What a step on a GPU did and when, by events on the streams on which it ran.

Compute lies on the current stream: an event before every record and one behind it. A collective runs on a stream of
NCCL's own: a stream of ours for each communicator does nothing but wait for its collectives, and an event behind each
wait is the end of one. A copy to or from the host has an event behind it on its own stream. The host launches records
faster than they run only where these are long, so the first thing of a step is a kernel that waits while the host runs
ahead: what follows lies as close as in a replay. Spans are as ``parallel/runtime/trace.py`` makes them on a CPU.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ...kernels.ops import OPS
from ...parallel.ir.collectives import FUSED
from ...parallel.ir.communicators import communicator
from ...parallel.ir.records import COMPUTE_LANE, Op
from ...parallel.ir.span import Span
from ...parallel.runtime.executor import Executor

AHEAD_CYCLES = 200_000_000  # of the SMs' clock: 0.1 to 0.2 s, in which the host launches some ten thousand kernels


@dataclass(frozen=True)
class _Ran:
    """Events of one record: before and behind it on the current stream; of what was issued, its end elsewhere."""

    op: Op
    before: torch.cuda.Event
    behind: torch.cuda.Event
    ended: torch.cuda.Event | None


@torch.no_grad()
def traced_on_gpu(executor: Executor) -> list[Span]:
    """Run one step; spans in the order of their records, collectives and copies at their issue."""
    torch.cuda.synchronize()
    origin = _mark()
    origin.synchronize()
    origin_s = time.perf_counter()  # the clock that the processes of a machine share
    torch.cuda._sleep(AHEAD_CYCLES)
    ran = _run(executor)
    torch.cuda.synchronize()

    def at(event: torch.cuda.Event) -> float:
        return origin_s + 1e-3 * origin.elapsed_time(event)

    spans: list[Span | None] = []
    issued: dict[str, tuple[int, _Ran]] = {}  # by the name of the issue: its place among the spans
    free: dict[str, float] = {}  # when each lane ended its last collective or copy
    for one in ran:
        op, before, behind = one.op, at(one.before), at(one.behind)
        if op.is_wait:
            place, issue = issued.pop(op.waits_for)
            assert issue.ended is not None
            lane, since, end = communicator(issue.op), at(issue.before), at(issue.ended)
            start = min(max(since, free.get(lane, since)), end)
            free[lane] = max(end, free.get(lane, end))
            spans[place] = Span.of(issue.op, lane, start, end, issued_s=since, waited_s=behind - before)
        elif one.ended is not None:
            issued[op.name] = (len(spans), one)
            spans.append(None)
        else:
            lanes = (COMPUTE_LANE, communicator(op)) if op.kind in FUSED else (COMPUTE_LANE,)
            spans += [Span.of(op, lane, before, behind) for lane in lanes]
    return [span for span in spans if span is not None]


def _run(executor: Executor) -> list[_Ran]:
    """Launch every record, with the events around it."""
    waiting: dict[str, torch.cuda.Stream] = {}  # by communicator
    ran: list[_Ran] = []
    for record in executor.records:
        op, before = record.op, _mark()
        answer = record.run()
        behind, ended = _mark(), None
        if isinstance(answer, dist.Work):
            lane = communicator(op)
            if lane not in waiting:  # torch has 32 streams, and gives them out in turn
                waiting[lane] = torch.cuda.Stream(executor.device)
            stream = waiting[lane]
            with torch.cuda.stream(stream):
                answer.wait()
            ended = _mark(stream)
        elif op.to is not None and not op.is_wait:
            ended = _mark(executor.host.streams[op.to])
        else:
            assert op.kind in OPS or op.kind in FUSED or op.is_wait, op.name
        ran.append(_Ran(op, before, behind, ended))
    return ran


def _mark(stream: torch.cuda.Stream | None = None) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event
