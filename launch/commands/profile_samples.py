"""From the spans of watched steps to what ``calibrate --profile`` reads: seconds by shape."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from ...kernels.ops import OPS
from ...parallel.ir.program import Program
from ...parallel.ir.records import COMPUTE_LANE, Op
from ...parallel.ir.span import Span
from ...parallel.runtime.mesh import group_ranks
from ...perf_model.calibration.calibrate import Key, TimedSamples
from ...perf_model.calibration.levels import ProfileSample

LEAST_RECORD_S = 1e-9  # what the clock tells apart: a record that took none has a time all the same

Shape = tuple[str, str, Key]  # part, name, key


def samples_of(program: Program, by_rank: Sequence[Sequence[Sequence[Span]]], local: int) -> list[ProfileSample]:
    """``by_rank``: of every rank its steps, each with its spans; ``local``: ranks of a server.

    An op's time is the mean over ranks, steps and records of its shape: means sum to the step, and medians do not on a
    machine that does other work beside. Of a collective, the rank that came last sees the transfer and no lateness: the
    least of all ranks, and the mean of these.
    """
    shapes = dict(_shapes(program, local))
    seconds: dict[Shape, list[float]] = defaultdict(list)
    for steps in zip(*by_rank, strict=True):  # the same step on every rank
        ran = [{span.name: span.ran_s for span in step if _own(span)} for step in steps]
        for name, shape in shapes.items():
            of_ranks = [own[name] for own in ran if name in own]
            if of_ranks:
                seconds[shape] += [min(of_ranks)] if shape[0] == "collectives" else of_ranks
    counts = Counter(shapes.values())
    return [
        ProfileSample(
            part=shape[0],
            name=shape[1],
            key=shape[2],
            seconds=max(statistics.fmean(found), LEAST_RECORD_S),
            count=counts[shape],
        )
        for shape, found in seconds.items()
    ]


def _own(span: Span) -> bool:
    """Whether it is the record's own run: of a collective not what it holds of compute."""
    return (span.lane == COMPUTE_LANE) == (span.kind in OPS)


def _shapes(program: Program, local: int) -> Iterator[tuple[str, Shape]]:
    """By the name of each record that runs alone, what it is timed as."""
    for whole in program.ops:
        for op in whole.parts:
            if op.kind in OPS:
                yield op.name, _of_compute(program, op)
            elif op.is_issue and op.to is None:
                ranks = group_ranks(program.plan, op.axes, 0)
                servers = len({rank // local for rank in ranks})
                yield op.name, ("collectives", op.kind, (program.payload_bytes(op), len(ranks), servers))


def _of_compute(program: Program, op: Op) -> Shape:
    one = TimedSamples()
    one.add_op(program, op, 0.0)
    part, times = next((part, of) for part in ("matmul", "attention", "stream") if (of := getattr(one, part)))
    ((name, by_key),) = times.items()
    (key,) = by_key
    return part, name, key
