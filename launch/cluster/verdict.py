"""Who holds up a job: from where every rank stands, who waits for whom, and who waits for nobody (torch-free)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...parallel.ir.collectives import FUSED
from ...parallel.ir.layout import Axes
from ...parallel.ir.program import Program
from ...parallel.ir.records import MARK, lane_name
from .marks import CAPTURED_PROGRAM, Doing, Standing

MOST_TOLD = 4  # ranks that are told one by one; the others are counted


_DOES = {
    Doing.STARTING: "where it starts",
    Doing.LOADING: "loading samples",
    Doing.PUBLISHING: "publishing a checkpoint",
    Doing.STEP: "between records",
    Doing.ENCODING: "behind its records, where captions are encoded",
    Doing.REPORTING: "reporting",
    Doing.VALIDATING: "validating",
    Doing.SAVING: "saving a checkpoint",
    Doing.SAMPLING: "sampling clips",
    Doing.DECODING: "decoding clips",
    Doing.ENDED: "at its end",
}


class Waypoint(NamedTuple):
    """A record of a program. ``issued``: where the collective that it waits for was, None where it waits for none.

    ``up_to``: where marks tell how far the program is, the last record before the next mark: a rank that is told to be
    here may be there as well. It waits for others here alone.
    """

    name: str
    kind: str
    axes: Axes
    issued: int | None
    up_to: str | None = None


@dataclass(frozen=True)
class At:
    """A rank as its watchdog saw it: ``silent_s`` without progress; ``stopped`` by a signal."""

    place: Standing
    silent_s: float
    stopped: bool
    host: str
    pid: int


@dataclass(frozen=True)
class RoundEnd:
    """``guilty``: the ranks that others wait for and that wait for nobody. ``where``: of the first, for comparisons."""

    guilty: tuple[int, ...]
    step: int
    where: str
    text: str


def stages_of(program: Program) -> list[Waypoint]:
    """Every record, as its position counts them; a mark's own is told by the record that it stands before."""
    ops = program.ops
    index = {op.name: i for i, op in enumerate(ops)}

    def issued(i: int) -> int | None:
        op = ops[i]
        if op.is_wait and op.to is None:
            return index[op.waits_for]
        return i - 1 if op.kind in FUSED else None  # within the record: who stands there has come

    last = dict[int, str]()  # by the position behind a mark
    marks = [i for i, op in enumerate(ops) if op.kind == MARK]
    for this, following in itertools.pairwise(marks):
        last[this + 1] = ops[following - 1].name
    found: list[Waypoint] = []
    for i, op in enumerate(ops):
        at = min(i + 1, len(ops) - 1) if op.kind == MARK else i
        up_to = last.get(at)
        shown = ops[at]
        found.append(Waypoint(shown.name, shown.kind, shown.axes, issued(i), None if up_to == shown.name else up_to))
    return found


def shown_place(place: Standing, programs: Sequence[Sequence[Waypoint]], *, waits: bool = False) -> str:
    """As ``step 3, at wait of blocks.0.q (all_gather over tp)``. ``waits``: for another rank, so not behind it."""
    where = f"{'clip' if place.phase in (Doing.SAMPLING, Doing.DECODING) else 'step'} {place.step + 1}"
    point = _record_of(place, programs)
    if point is None:
        captured = place.phase in (Doing.STEP, Doing.ENCODING) and place.program == CAPTURED_PROGRAM
        return f"{where}, {'which is captured' if captured else _DOES[place.phase]}"
    over = f" over {lane_name(point.axes)}" if point.axes else ""
    behind_it = f" or behind it, up to {point.up_to}" if point.up_to is not None and not waits else ""
    return f"{where}, at {point.name} ({point.kind}{over}){behind_it}"


def _record_of(place: Standing, programs: Sequence[Sequence[Waypoint]]) -> Waypoint | None:
    """The one that is not finished, where a program runs."""
    points = programs[place.program] if 0 <= place.program < len(programs) else ()
    return points[place.record] if place.record < len(points) else None


def behind(
    rank: int,
    ranks: Mapping[int, At | None],
    programs: Sequence[Sequence[Waypoint]],
    group: Callable[[Axes, int], Sequence[int]],
) -> list[int] | None:
    """The ranks that this one waits for; None where it waits for nobody, empty where all have come.

    A rank of which nothing is known has not come.
    """
    mine = ranks[rank]
    if mine is None:
        return None
    place = mine.place
    point = _record_of(place, programs)
    if place.host_calls % 2:
        return [other for other, at in ranks.items() if at is None or at.place.host_calls < place.host_calls]
    if point is None or point.issued is None:
        return None
    until, others = place.before + point.issued, group(point.axes, rank)
    return [o for o in others if o != rank and ((at := ranks[o]) is None or at.place.before + at.place.record <= until)]


def judged(
    ranks: Mapping[int, At | None],
    programs: Sequence[Sequence[Waypoint]],
    group: Callable[[Axes, int], Sequence[int]],
    limit_s: float,
    machines: Mapping[int, str] | None = None,
) -> RoundEnd:
    """``group``: the ranks that a rank communicates with over some axes. None: a rank that did not answer.

    ``machines``: of those that did not, where it is known.
    """
    waits = {rank: behind(rank, ranks, programs, group) for rank in ranks}
    ended = [rank for rank, at in ranks.items() if at is not None and at.place.phase is Doing.ENDED]
    ends = [rank for rank, others in waits.items() if not others and rank not in ended] or list(ranks)
    stopped = [rank for rank, at in ranks.items() if at is None or at.stopped]
    still = [rank for rank in ends if (at := ranks[rank]) is None or at.stopped or at.silent_s >= limit_s / 2]
    guilty = tuple([rank for rank in stopped if rank in ends] or still or ends)
    first = ranks[guilty[0]]
    step = max(at.place.step for at in ranks.values() if at is not None) if first is None else first.place.step
    alike = len(guilty) == len(ranks) > 1
    told = ["no rank can be told from the others"] if alike else []
    silent = [rank for rank in guilty if ranks[rank] is None]
    told += [_told(rank, at, programs) for rank in guilty[:MOST_TOLD] if (at := ranks[rank]) is not None]
    told += _without_answer(silent, machines or {})
    if (more := len([rank for rank in guilty[MOST_TOLD:] if ranks[rank] is not None])) > 0:
        told.append(f"{more} more ranks there")
    others = [rank for rank in ranks if rank not in guilty]
    for rank in others[:MOST_TOLD]:
        at, awaited = ranks[rank], waits[rank]
        assert at is not None
        whom = f" and waits for {_listed(awaited)}" if awaited else ""
        told.append(f"rank {rank} is in {shown_place(at.place, programs, waits=bool(awaited))}{whom}")
    if len(others) > MOST_TOLD:
        told.append(f"{len(others) - MOST_TOLD} more ranks wait")
    where = "no answer" if first is None else shown_place(first.place, programs)
    return RoundEnd(guilty, step, where, f"no progress for {limit_s:.0f} s: " + "; ".join(told))


def lost_with_machines(
    lost: Sequence[int], machines: Mapping[int, str], place: Standing, programs: Sequence[Sequence[Waypoint]]
) -> RoundEnd:
    """Of ranks that ended with the watchdogs beside them; ``place``: of one that is left."""
    where = shown_place(place, programs)
    text = "; ".join(_without_answer(lost, machines))
    return RoundEnd(tuple(lost), place.step, f"no answer in {where}", f"{text}; they were lost in {where}")


def store_lost(holder: str, place: Standing, programs: Sequence[Sequence[Waypoint]]) -> RoundEnd:
    """``holder``: of the job's store, in words; ``place``: of a rank that is left."""
    where = shown_place(place, programs)
    text = f"{holder}, which held the store of the job, is gone, or its machine is; it was lost in {where}"
    return RoundEnd((0,), place.step, f"no store in {where}", text)


def _without_answer(ranks: Sequence[int], machines: Mapping[int, str]) -> list[str]:
    """Machine by machine."""
    of: dict[str, list[int]] = {}
    for rank in ranks:
        of.setdefault(machines.get(rank, "a machine of which nothing is known"), []).append(rank)
    told: list[str] = []
    for machine, there in of.items():
        neither = "does not answer, nor its watchdog" if len(there) == 1 else "do not answer, nor their watchdogs"
        told.append(f"{_listed(there)} of {machine} {neither}")
    more = [f"nor do those of {len(told) - MOST_TOLD} more machines"] if len(told) > MOST_TOLD else []
    return [*told[:MOST_TOLD], *more]


def _told(rank: int, at: At, programs: Sequence[Sequence[Waypoint]]) -> str:
    how = "is stopped by a signal" if at.stopped else "stands"
    return f"rank {rank} (process {at.pid} on {at.host}) {how} in {shown_place(at.place, programs)}"


def _listed(ranks: Sequence[int]) -> str:
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    said = ", ".join(map(str, ranks[:MOST_TOLD]))
    return f"rank{'s' if len(ranks) > 1 else ''} {said}" + (" and others" if len(ranks) > MOST_TOLD else "")
