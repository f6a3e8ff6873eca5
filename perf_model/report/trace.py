"""When everything of a step ran: spans, and the Chrome trace that Perfetto and chrome://tracing open (torch-free).

A span is predicted or measured; both are drawn and written alike, on one track for compute and one a communicator. A
recording has its waits as spans. Of a prediction, the time that compute waits for a collective ends when the collective
ends, so a span with ``waited_s`` tells where the wait lies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...files import atomic_file
from ...kernels.ops import OPS
from ...parallel.ir.collectives import FUSED
from ...parallel.ir.communicators import communicator
from ...parallel.ir.records import COMPUTE_LANE as COMPUTE
from ...parallel.ir.records import WAIT, Phase
from ...parallel.ir.span import Span
from ..prices.footprint import ByteStack
from ..prices.played import PlayedStep

MEMORY_POINTS = 2000  # samples of the memory counter in a trace
_LANES = (COMPUTE, "tp", "cp", "dp_shard")  # from the innermost; other lanes follow


def predicted(whole: PlayedStep) -> list[Span]:
    """Spans of a played step, in the order of its program. Records that take no time are left out.

    A fused record is on both its lanes; what it waits for lies within it.
    """
    timeline = whole.timeline
    spans: list[Span] = []
    for i, (op, reached) in enumerate(zip(whole.program.ops, reached_s(whole), strict=True)):
        start, end = timeline.start[i], timeline.end[i]
        if op.is_wait or end <= start:
            continue
        if op.kind in OPS:
            spans.append(Span.of(op, COMPUTE, start, end))
        elif op.kind in FUSED:
            spans += [Span.of(op, lane, start, end) for lane in (COMPUTE, communicator(op))]
        else:
            waited = timeline.exposed_s.get(i, 0.0)
            spans.append(Span.of(op, communicator(op), start, end, issued_s=reached, waited_s=waited))
    return spans


def reached_s(whole: PlayedStep) -> list[float]:
    """When compute reached each record. A collective may start later than it is issued."""
    clock = 0.0
    reached: list[float] = []
    for i, op in enumerate(whole.program.ops):
        if op.kind in OPS or op.kind in FUSED or op.is_wait:
            reached.append(whole.timeline.start[i])
            clock = whole.timeline.end[i]
        else:
            reached.append(clock)
    return reached


def waits(spans: Sequence[Span]) -> list[Span]:
    """The exposed times of a prediction as spans of the compute lane."""
    return [_wait(span) for span in spans if span.waited_s > 0.0]


def _wait(span: Span) -> Span:
    start = span.end_s - span.waited_s
    times = {"issued_s": start, "start_s": start, "waited_s": 0.0}
    return replace(span, name=f"{span.name}.wait", kind=WAIT, lane=COMPUTE, **times)


def lanes(spans: Sequence[Span]) -> list[str]:
    """Lanes in use: compute, then mesh axes from the innermost outwards."""

    def rank(lane: str) -> tuple[int, int, str]:
        axis = lane.partition(":")[0].partition("*")[0]
        return _LANES.index(axis) if axis in _LANES else len(_LANES), lane.count("*"), lane

    return sorted({span.lane for span in spans} | {COMPUTE}, key=rank)


def direction_of(span: Span) -> Phase | None:
    """Forward or backward, of compute in a block; backward begins with what is made again for it."""
    if span.lane != COMPUTE or span.place.block is None or span.place.phase not in (Phase.FORWARD, Phase.BACKWARD):
        return None
    return Phase.BACKWARD if span.clone else span.place.phase


def block_window(spans: Sequence[Span], block: int, direction: Phase, micro_batch: int = 0) -> tuple[float, float]:
    """From the first compute of a block in one direction to the first of the block that follows it, in seconds.

    Where no block follows, it ends with its last compute.
    Raises ValueError when the block never ran.
    """
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for span in spans:
        number = span.place.block
        if number is None or span.place.micro_batch != micro_batch or direction_of(span) != direction:
            continue
        first[number] = min(first.get(number, span.start_s), span.start_s)
        last[number] = max(last.get(number, span.end_s), span.end_s)
    if block not in first:
        raise ValueError(f"block {block} of micro-batch {micro_batch} has no {direction} in these {len(spans)} spans")
    following = first.get(block + 1 if direction is Phase.FORWARD else block - 1)
    return first[block], following if following is not None else last[block]


def block_starts(spans: Sequence[Span]) -> list[float]:
    """When each block began, in both directions and every micro-batch, and when the last ended; seconds, ascending."""
    starts: dict[tuple[int | None, int | None, Phase], float] = {}
    end = 0.0
    for span in spans:
        direction = direction_of(span)
        if direction is None:
            continue
        key = (span.place.micro_batch, span.place.block, direction)
        starts[key] = min(starts.get(key, span.start_s), span.start_s)
        end = max(end, span.end_s)
    return sorted({*starts.values(), end})


# -- the trace file ---------------------------------------------------------------------------------------------------


def _metadata(process: int, what: str, name: str, thread: int = 0, order: int = 0) -> Iterator[dict[str, Any]]:
    head = {"ph": "M", "pid": process, "tid": thread}
    yield head | {"name": f"{what}_name", "args": {"name": name}}
    yield head | {"name": f"{what}_sort_index", "args": {"sort_index": order}}


def _events(process: int, name: str, spans: Sequence[Span], thread: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """One process, with a thread for each lane."""
    yield from _metadata(process, "process", name, order=process)
    for lane, number in thread.items():
        yield from _metadata(process, "thread", lane, number, number)
    for span in sorted(spans, key=lambda span: (_ns(span.start_s), -_ns(span.end_s))):
        event: dict[str, Any] = {
            "ph": "X",
            "name": span.name,
            "cat": "recomputed" if span.clone else span.kind,
            "pid": process,
            "tid": thread[span.lane],
            "ts": _ns(span.start_s) / 1e3,
            "dur": (_ns(span.end_s) - _ns(span.start_s)) / 1e3,
            "args": {"kind": span.kind},
        }
        if span.lane != COMPUTE:
            queued = max(span.start_s - span.issued_s, 0.0)
            event["args"] |= {"queued_us": queued * 1e6, "exposed_us": span.waited_s * 1e6}
        yield event


def _ns(seconds: float) -> int:
    """Whole nanoseconds, as viewers keep them: slices that meet neither overlap nor leave a gap."""
    return round(seconds * 1e9)


def _counters(process: int, whole: PlayedStep, stacked: ByteStack) -> Iterator[dict[str, Any]]:
    """Live bytes by class as a counter track."""
    for i, seconds in highest(whole, stacked, MEMORY_POINTS):
        yield {
            "ph": "C",
            "name": "memory (GB)",
            "pid": process,
            "ts": seconds * 1e6,
            "args": {name: values[i] / 1e9 for name, values in stacked.by_class.items()},
        }


def highest(whole: PlayedStep, stacked: ByteStack, points: int) -> list[tuple[int, float]]:
    """Records that stand for the step's memory, with their times in seconds, in the order of the program.

    Of each of ``points`` equal pieces of time it is the one with most live bytes: the peak is always among them.
    """
    width = max(whole.timeline.step_s / points, 1e-12)
    best: dict[int, tuple[int, float]] = {}
    for i, seconds in enumerate(reached_s(whole)):
        piece = int(seconds / width)
        if piece not in best or stacked.total[i] > stacked.total[best[piece][0]]:
            best[piece] = (i, seconds)
    return sorted(best.values())


def chrome(processes: Mapping[str, Sequence[Span]], whole: PlayedStep | None = None) -> dict[str, Any]:
    """Trace events of one or several recordings, each a process of its own by its name; a lane is one track in all.

    ``whole`` adds its memory to the first process. Times are microseconds, as the format wants.
    """
    events: list[dict[str, Any]] = []
    tracks = lanes([span for spans in processes.values() for span in spans])
    thread = {lane: number for number, lane in enumerate(tracks)}
    for number, (name, spans) in enumerate(processes.items()):
        events.extend(_events(number, name, spans, thread))
    if whole is not None:
        events.extend(_counters(0, whole, whole.stack))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write(path: Path, processes: Mapping[str, Sequence[Span]], whole: PlayedStep | None = None) -> None:
    """Write a trace file. The final name appears when the file is complete."""
    with atomic_file(path) as unfinished:
        unfinished.write_text(json.dumps(chrome(processes, whole)), encoding="utf-8")
