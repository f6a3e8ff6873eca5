"""What a replayed CUDA Graph did and when: CUPTI's kernels, named by the records that launched them.

CUPTI calls a kernel of a replay by its own name alone. So one step is launched record by record first, each record
inside a range of its name: a kernel belongs to the record in whose range its launch lies. A replay runs the same
kernels, and those of one name in the same order, since compute is one stream and collectives start in the order of
their issue. A replay that ran others, or other many, is refused.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ...documents import read_json
from ...errors import CinemeshError
from ...kernels.ops import OPS
from ...parallel.ir.collectives import FUSED
from ...parallel.ir.communicators import communicator
from ...parallel.ir.records import COMPUTE_LANE, Op
from ...parallel.ir.span import Span
from ...parallel.runtime.executor import Executor

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of torch's trace
LAUNCHES = ("cuda_runtime", "cuda_driver")
RANGES = "user_annotation"

Events = list[dict[str, Any]]
Launched = Mapping[str, Sequence[str]]  # by the name of a kernel: the records that launch it, in order


@dataclass(frozen=True)
class RanKernel:
    """One kernel or copy of a replay, and the record that it is of. Seconds."""

    record: str
    start_s: float
    end_s: float


@torch.no_grad()
def kernels_of_records(executor: Executor) -> Launched:
    """Run one step, launched by the host; which record launches which kernel."""

    def run() -> None:
        for record in executor.records:
            with record_function(record.op.name):
                record.run()

    return launched_by(
        _events(run, ProfilerActivity.CPU, ProfilerActivity.CUDA), {op.name for op in executor.program.ops}
    )


def traced_replay(ops: Sequence[Op], launched: Launched, replay: Callable[[], None]) -> list[Span]:
    """Run one replay; spans in the order of its records. Raises CinemeshError as :func:`named`."""
    return spans_of(ops, named(_events(replay, ProfilerActivity.CUDA), launched))


def _events(run: Callable[[], None], *activities: ProfilerActivity) -> Events:
    """What torch's profiler saw of it, as its trace file has it: times in microseconds."""
    torch.cuda.synchronize()
    with profile(activities=activities) as seen:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return read_json(path, "torch's trace", "profile without capture: --set capture=off")["traceEvents"]


def _kernels(events: Events) -> Events:
    """What ran on the device, in the order in which it started."""
    return sorted((e for e in events if e.get("cat") in ON_DEVICE), key=lambda e: e["ts"])


def launched_by(events: Events, records: set[str]) -> Launched:
    """By kernel, the records in whose range each of its launches lies, in the order in which they ran.

    Raises CinemeshError for a kernel that no record launched.
    """
    ranges = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events
                    if e.get("cat") == RANGES and e["name"] in records)  # fmt: skip
    launch_at = {e["args"]["correlation"]: e["ts"] for e in events if e.get("cat") in LAUNCHES and "args" in e}
    found: dict[str, list[str]] = defaultdict(list)
    for event in _kernels(events):
        at = launch_at.get(event["args"]["correlation"])
        inside = [name for start, end, name in ranges if at is not None and start <= at <= end]
        if len(inside) != 1:
            raise CinemeshError(
                f"kernel {event['name']} of a profiled step was launched by {len(inside)} records",
                remedy="profile without capture: --set capture=off",
            )
        found[event["name"]].append(inside[0])
    return found


def named(events: Events, launched: Launched) -> list[RanKernel]:
    """The kernels of a replay with their records. Raises CinemeshError where the launched step had others."""
    places = {name: iter(records) for name, records in launched.items()}
    kernels = _kernels(events)
    counts = {name: sum(e["name"] == name for e in kernels) for name in {*launched} | {e["name"] for e in kernels}}
    if differing := [name for name, count in counts.items() if count != len(launched.get(name, ()))]:
        name = min(differing)
        raise CinemeshError(
            f"a replay ran kernel {name} {counts[name]} times, the launched step {len(launched.get(name, ()))} times: "
            "they cannot be named",
            remedy="profile without capture: --set capture=off",
        )
    return [RanKernel(next(places[e["name"]]), 1e-6 * e["ts"], 1e-6 * (e["ts"] + e["dur"])) for e in kernels]


def spans_of(ops: Sequence[Op], kernels: Sequence[RanKernel]) -> list[Span]:
    """Spans as a recording on events has them: an op from its first kernel to the end of its last; waits are gaps."""
    when: dict[str, tuple[float, float]] = {}
    for ran in kernels:
        start, end = when.get(ran.record, (ran.start_s, ran.end_s))
        when[ran.record] = min(start, ran.start_s), max(end, ran.end_s)
    spans: list[Span | None] = []
    issued: dict[str, tuple[int, Op, float]] = {}  # by name: its place among the spans, and when it was issued
    pending: list[Op] = []  # waits that no compute has followed yet
    clock = min((start for start, _ in when.values()), default=0.0)  # the end of compute so far
    for op in ops:
        if op.is_wait:
            pending.append(op)
        elif op.kind in OPS or op.kind in FUSED:
            if op.name not in when:
                continue
            start, end = when[op.name]
            clock = _pass_waits(spans, pending, issued, when, clock, start)
            lanes = (COMPUTE_LANE, communicator(op)) if op.kind in FUSED else (COMPUTE_LANE,)
            spans += [Span.of(op, lane, start, end) for lane in lanes]
            clock = end
        elif op.name in when:
            issued[op.name] = (len(spans), op, clock)
            spans.append(None)
    last = max((end for _, end in when.values()), default=0.0)
    _pass_waits(spans, pending, issued, when, clock, last)
    return [span for span in spans if span is not None]


def _pass_waits(
    spans: list[Span | None],
    pending: list[Op],
    issued: dict[str, tuple[int, Op, float]],
    when: Mapping[str, tuple[float, float]],
    clock: float,
    start: float,
) -> float:
    """Put what compute stood for from ``clock`` to ``start`` down to the waits between; the clock behind them."""
    for wait in pending:
        if wait.waits_for not in issued:
            continue
        place, op, since = issued.pop(wait.waits_for)
        begun, ended = when[op.name]
        until = min(max(clock, ended), start)
        spans[place] = Span.of(op, communicator(op), begun, ended, issued_s=min(since, begun), waited_s=until - clock)
        spans.append(Span.of(wait, COMPUTE_LANE, clock, until))
        clock = until
    pending.clear()
    return clock
