"""Steps that ran beside their prediction: what every record and lane takes of a step (torch-free).

Compute is one lane, on which a step passes: from the moment at which one record is reached to that of the next, the
first one *held* it. Of a collective that is its issue and its wait. What all records held is the step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

from ...kernels.ops import OPS
from ...parallel.ir.collectives import FUSED
from ...parallel.ir.communicators import communicator
from ...parallel.ir.program import Program
from ...parallel.ir.records import COMPUTE_LANE, Op
from ...parallel.ir.span import Span, role
from ..prices.played import PlayedStep

RowKey = tuple[str, str]  # role, lane


@dataclass(frozen=True)
class ProfileRow:
    """Records of one role, of all blocks and micro-batches: seconds of one step, the mean of ranks and steps.

    ``ran_s``: that they ran; ``held_s``: that they held compute: of a collective, what it was waited for.
    """

    role: str
    kind: str
    lane: str
    count: int
    ran_s: float
    predicted_ran_s: float
    held_s: float
    predicted_held_s: float

    @property
    def off_s(self) -> float:
        """By how much the prediction errs, as seconds of a step: of what they ran, or held, whichever is more."""
        return max(abs(self.ran_s - self.predicted_ran_s), abs(self.held_s - self.predicted_held_s))


@dataclass(frozen=True)
class ProfileLane:
    """A lane of one step: seconds that its records ran and, beside compute, that compute waited for them."""

    lane: str
    ran_s: float
    predicted_ran_s: float
    held_s: float
    predicted_held_s: float


@dataclass(frozen=True)
class StepProfile:
    """One plan, ``steps`` of it on every rank. Seconds of a step.

    ``step_s``: of those that were watched, by their records' moments; ``plain_step_s``: of those that were not, on
    which nothing was measured but their ends. ``accounted``: what the lanes held of a watched step over the seconds of
    the unwatched one before it, the median. Rows: the worst disagreement first.
    """

    steps: int
    step_s: float
    plain_step_s: float
    predicted_step_s: float
    accounted: float
    rows: list[ProfileRow]

    @property
    def lanes(self) -> list[ProfileLane]:
        """Compute, with what waits held of it apart; then each communicator."""
        found: dict[str, list[ProfileRow]] = defaultdict(list)
        for row in self.rows:
            found[row.lane].append(row)
        names = sorted(found, key=lambda lane: (lane != COMPUTE_LANE, lane))
        return [
            ProfileLane(
                name,
                *(sum(getattr(row, of) for row in found[name])
                  for of in ("ran_s", "predicted_ran_s", "held_s", "predicted_held_s")),
            )
            for name in names
        ]  # fmt: skip

    @property
    def error(self) -> float:
        """The mean error of the prices of records, by the seconds that each ran."""
        return sum(abs(row.ran_s - row.predicted_ran_s) for row in self.rows) / sum(row.ran_s for row in self.rows)


def step_seconds(spans: Sequence[Span]) -> float:
    """From the first record of a step to the end of its last."""
    return max(span.end_s for span in spans) - reached(spans[0])


def reached(span: Span) -> float:
    """When compute came to a record."""
    return span.start_s if span.lane == COMPUTE_LANE else span.issued_s


def held_by(spans: Sequence[Span]) -> list[float]:
    """Of one step, in the order of its records: until the next one was reached. Their sum is the step."""
    moments = [*map(reached, spans), max(span.end_s for span in spans)]
    return [max(0.0, after - before) for before, after in pairwise(moments)]


def profiled(steps: Sequence[Sequence[Span]], plain_s: Sequence[float], whole: PlayedStep) -> StepProfile:
    """``steps``: of all ranks, each with the spans of one step of the program of ``whole``, in its order.

    ``plain_s``: seconds of the unwatched step before each.
    """
    keys = _keys(whole.program)
    ran, held, counts = (
        defaultdict[RowKey, float](float),
        defaultdict[RowKey, float](float),
        defaultdict[RowKey, int](int),
    )
    for spans in steps:
        for span, seconds in zip(spans, held_by(spans), strict=True):
            key, first = keys[span.name]
            held[key] += seconds
            if span.lane == key[1]:  # else of a collective: its wait
                ran[key] += span.ran_s
                counts[key] += first
    kinds = {_key(op): op.kind for op in whole.program.ops if not op.is_wait}
    foretold_ran, foretold_held = _predicted(whole)
    n = len(steps)
    rows = [
        ProfileRow(*key[:1], kind, key[1], counts[key] // n, ran[key] / n, foretold_ran.get(key, 0.0),
                   held[key] / n, foretold_held.get(key, 0.0))
        for key, kind in kinds.items()
        if counts[key]  # records that run no kernel have no time
    ]  # fmt: skip
    return StepProfile(
        n,
        fmean(map(step_seconds, steps)),
        fmean(plain_s),
        whole.step_s,
        median(sum(held_by(spans)) / plain for spans, plain in zip(steps, plain_s, strict=True)),
        sorted(rows, key=lambda row: -row.off_s),
    )


def _key(op: Op) -> RowKey:
    lane = COMPUTE_LANE if op.kind in OPS or op.kind in FUSED else communicator(op)
    return role(op), lane


def _keys(program: Program) -> dict[str, tuple[RowKey, bool]]:
    """By the name of a record, or of a part of a fused one: its row, and whether it is counted there."""
    found: dict[str, tuple[RowKey, bool]] = {}
    for op in program.ops:
        if op.is_wait:
            found[op.name] = found[op.waits_for][0], False
            continue
        for i, part in enumerate(op.parts):
            found[part.name] = _key(op), i == 0
        found[op.name] = _key(op), True
    return found


def _predicted(whole: PlayedStep) -> tuple[dict[RowKey, float], dict[RowKey, float]]:
    """By row, what records run and hold in one played step."""
    timeline = whole.timeline
    ran, held = defaultdict[RowKey, float](float), defaultdict[RowKey, float](float)
    for i, op in enumerate(whole.program.ops):
        if op.is_wait:
            continue
        key, lasts = _key(op), timeline.end[i] - timeline.start[i]
        ran[key] += lasts
        held[key] += lasts if key[1] == COMPUTE_LANE else timeline.exposed_s.get(i, 0.0)
    return ran, held
