"""A whole step from the records of a few blocks: which stretches repeat, and playing them (torch-free).

[Note: steady] Equal blocks have equal records: two neighbours are compared, and one of them then stands for all that
are left out; so it is with micro-batches. The stretch is played again and again, whatever is in flight carried over,
until the collectives in flight and in the queue are, at its start, as far as they were at its start before: from there
on every further one takes as long. A queue that grows never comes back to where it was: then all are played.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...kernels.ops import OPS
from ...parallel.ir.communicators import communicator
from ...parallel.ir.flops import record_flops
from ...parallel.ir.program import Program
from ...parallel.ir.records import Op, Phase
from ..prices.timeline import COMPUTE, FUSE, ISSUE, Player, Record, Tape

AGAIN = 1e-9  # of a stretch's time: difference in what is left of a collective that counts as none


class NotSteady(Exception):
    """No two neighbours of what is left out have equal records: only the whole step can say."""


@dataclass(frozen=True)
class Loop:
    """Records ``begin`` to ``end``, which stand ``times`` times in the step; ``inner``: loops among them.

    A count, not to be played, where fewer blocks than are built leave less than none.
    """

    begin: int
    end: int
    times: int
    inner: tuple[Loop, ...] = ()


@dataclass(frozen=True)
class Unrolled:
    """The loops of a step. ``counts``: how often each record stands in it."""

    loops: tuple[Loop, ...]
    counts: list[int]

    def hardware_flops(self, program: Program) -> int:
        """Of the matrix products that one rank runs in the whole step; ``program``: the one unrolled."""
        return sum(n * record_flops(program, op) for n, op in zip(self.counts, program.ops, strict=True))


class Stretches:
    """What repeats in a program of a few blocks and micro-batches.

    ``last_blocks``: those that recompute otherwise than the first ones. With ``proven`` only stretches are taken that
    equal their neighbour: raises NotSteady where there are none. ``rough``: another one stands for what is left out.
    """

    def __init__(self, program: Program, *, proven: bool) -> None:
        self.program, self.proven, self.rough = program, proven, False
        self.last_blocks = program.plan.last_blocks
        self.marks = marks_of(program)
        self._issue_of = _issue_of(program)
        self._disordered: set[int] = set()
        self.lines, self.places, self.still = self._lines()
        self._facts = [self._fact(i, op) for i, op in enumerate(program.ops)]
        directions: dict[int, list[tuple[list[int], list[int]]]] = {}
        for (micro_batch, direction), starts in self.marks.items():
            at = self._segments(len(starts), direction)
            bodies = [self._steady([*itertools.pairwise(starts[first : stop + 1])]) for first, stop in at]
            directions.setdefault(micro_batch or 0, []).append((starts, bodies))
        self._blocks = directions
        begins = [min(starts[0] for starts, _ in one) for one in directions.values()]
        self._batches = [*itertools.pairwise(begins)]
        self._batch = self._steady(self._batches[1:]) + 1 if len(self._batches) > 1 else 0

    def _segments(self, blocks: int, direction: Phase) -> list[tuple[int, int]]:
        """Places of the first and of the last blocks, in the order of execution, each with the one behind them."""
        last = self.last_blocks
        cut = blocks - last if direction is Phase.FORWARD else last
        two = [(0, cut), (cut, blocks - 1)] if last else [(0, blocks - 1)]
        return two if direction is Phase.FORWARD else two[::-1]

    # -- what is equal --------------------------------------------------------------------------------------------

    def _lines(self) -> tuple[list[int], list[int], list[int]]:
        """Of every record its line, of a wait its issue's place among those open, and how many stay open behind it.

        The issues of a line are waited for in their order, or all at the end; else it is ``_disordered``, and every
        stretch that is repeated must wait for as many as it issues. -1: neither issue nor wait.
        """
        numbers: dict[object, int] = {}
        lines, places, still = ([n] * len(self.program.ops) for n in (-1, 0, 0))
        issued: dict[int, list[int]] = {}
        later: dict[int, list[int]] = {}  # waits for another issue than the first, with none issued since
        for i, op in enumerate(self.program.ops):
            if op.is_issue:
                where = op.place.title if op.place.block is None else ""
                key = (communicator(op), op.place.phase, where, op.role, op.slice, op.clone)
                lines[i] = line = numbers.setdefault(key, len(numbers))
                issued.setdefault(line, []).append(i)
                self._disordered.update([line] if line in later else ())
            elif op.is_wait:
                lines[i] = line = lines[self._issue_of[i]]
                places[i] = issued[line].index(self._issue_of[i])
                if places[i]:
                    later.setdefault(line, []).append(i)
                issued[line].remove(self._issue_of[i])
                still[i] = len(issued[line])
        for line in later.keys() - self._disordered:
            places = [0 if at == line else place for at, place in zip(lines, places, strict=True)]
        return lines, places, still

    def _fact(self, i: int, op: Op) -> tuple[object, ...]:
        """What a record is, wherever it stands; of a wait also how far behind its issue."""
        behind = i - self._issue_of[i] if op.is_wait else 0
        shapes = tuple([self.program.buffers[name].shape for name in op.outputs])
        return (op.kind, op.role, op.slice, op.clone, op.place.phase, op.lane, shapes, behind)

    def _balanced(self, body: tuple[int, int]) -> bool:
        """Whether on every line as many are waited for as are issued, or none where these are in order: at the end."""
        lines = max(self.lines, default=-1) + 1
        issues, waits = [0] * lines, [0] * lines
        for i in range(*body):
            if (line := self.lines[i]) >= 0:
                counted = issues if self.program.ops[i].is_issue else waits
                counted[line] += 1
        none = [not n and line not in self._disordered for line, n in enumerate(waits)]
        return all(n == issued or none for issued, n, none in zip(issues, waits, none, strict=True))

    def _steady(self, bodies: list[tuple[int, int]]) -> int:
        """Which of neighbouring stretches stands for those left out; -1 if there are none."""
        facts = self._facts
        for j, (one, other) in enumerate(itertools.pairwise(bodies)):
            if facts[slice(*one)] == facts[slice(*other)] and self._balanced(other):
                return j + 1
        if self.proven or not bodies:
            return -1
        self.rough, middle = True, (len(bodies) - 1) // 2
        order = sorted(range(len(bodies)), key=lambda j: (abs(j - middle), j))
        return next((j for j in order if self._balanced(bodies[j])), -1)

    # -- the whole step -------------------------------------------------------------------------------------------

    def unroll(self, blocks: tuple[int, int], micro_batches: int) -> Unrolled:
        """The step of ``blocks`` first and last blocks; raises NotSteady where nothing stands for those left out."""
        loops: list[Loop] = []
        for micro_batch, directions in self._blocks.items():
            inner = tuple(sorted(self._block_loops(directions, blocks), key=lambda loop: loop.begin))
            more = micro_batches - len(self._blocks)
            if micro_batch == self._batch and more > 0:
                if self._batch <= 0:
                    raise NotSteady("no two micro-batches are alike")
                loops.append(Loop(*self._batches[self._batch], 1 + more, inner))
            else:
                loops.extend(inner)
        counts = [1] * len(self.program.ops)
        _count(loops, counts, 1)
        return Unrolled(tuple(loops), counts)

    def _block_loops(self, directions: list[tuple[list[int], list[int]]], blocks: tuple[int, int]) -> Iterator[Loop]:
        for (starts, bodies), direction in zip(directions, (Phase.FORWARD, Phase.BACKWARD), strict=True):
            here = len(starts)
            built = (here - self.last_blocks, self.last_blocks)
            segments = self._segments(here, direction)
            for (first, _), body, deep, few in zip(segments, bodies, blocks, built, strict=False):
                if deep != few:
                    if body < 0:
                        raise NotSteady("no two blocks are alike")
                    yield Loop(starts[first + body], starts[first + body + 1], 1 + deep - few)


def marks_of(program: Program) -> dict[tuple[int | None, Phase], list[int]]:
    """First record of every block, by micro-batch and direction, in the order of execution."""
    marks: dict[tuple[int | None, Phase], dict[int, int]] = {}
    for i, op in enumerate(program.ops):
        if op.clone or op.kind not in OPS:
            continue
        place = op.place
        if place.block is not None and place.phase in (Phase.FORWARD, Phase.BACKWARD):
            marks.setdefault((place.micro_batch, place.phase), {}).setdefault(place.block, i)
    return {key: list(blocks.values()) for key, blocks in marks.items()}


def _issue_of(program: Program) -> dict[int, int]:
    """Of every wait, the record that issued its collective."""
    issues: dict[str, int] = {}
    found: dict[int, int] = {}
    for i, op in enumerate(program.ops):
        if op.is_issue:
            issues[op.name] = i
        elif op.is_wait:
            found[i] = issues[op.waits_for]
    return found


def _count(loops: Sequence[Loop], counts: list[int], times: int) -> None:
    for loop in loops:
        for i in range(loop.begin, loop.end):
            counts[i] = times * loop.times
        _count(loop.inner, counts, times * loop.times)


# -- playing it -------------------------------------------------------------------------------------------------------


def play_unrolled(tape: Tape, stretches: Stretches, unrolled: Unrolled) -> tuple[float, float]:
    """Seconds of the whole step, and those in which compute waits for collectives. See [Note: steady]."""
    run = _Run(tape, stretches)
    run.stretch(0, len(tape.records), unrolled.loops)
    run.player.drain()
    return run.player.now, run.exposed_s


State = tuple[list[tuple[Record, float, float]], list[Record]]


class _Run:
    """A tape being played. ``open``: on every line, the issues that nothing has waited for."""

    def __init__(self, tape: Tape, stretches: Stretches) -> None:
        self.records, self.lines = tape.records, stretches.lines
        self.places, self.still = stretches.places, stretches.still
        self.player = Player(tape)
        self.open: list[deque[int]] = [deque() for _ in range(max(self.lines, default=-1) + 1)]
        self.issued = 0
        self.exposed_s = 0.0

    def stretch(self, begin: int, end: int, loops: Sequence[Loop]) -> None:
        for loop in loops:
            self._once(begin, loop.begin)
            self._loop(loop)
            begin = loop.end
        self._once(begin, end)

    def _once(self, begin: int, end: int) -> None:
        player, records = self.player, self.records
        for i in range(begin, end):
            record = records[i]
            kind = record.kind
            if kind == COMPUTE:
                player.compute(record, record.seconds)
            elif kind == ISSUE:
                self.issued += 1
                self.open[self.lines[i]].append(self.issued)
                player.issue(self.issued, record)
            elif kind == FUSE:
                self.issued += 1
                self.exposed_s += player.fused(self.issued, record)[1]
            else:
                waiting, reached = self.open[self.lines[i]], player.now
                if place := self.places[i]:
                    player.wait(waiting[place])
                    del waiting[place]
                while len(waiting) > self.still[i]:  # at the end of the step: as many more as blocks were left out
                    player.wait(waiting.popleft())
                self.exposed_s += player.now - reached

    def _loop(self, loop: Loop) -> None:
        before, took, waited = None, 0.0, 0.0
        for left in range(loop.times, 0, -1):
            state = self._state()
            if before is not None and _alike(before, state, AGAIN * took):
                self.player.now += left * took
                self.exposed_s += left * waited
                return
            begun, exposed, before = self.player.now, self.exposed_s, state
            self.stretch(loop.begin, loop.end, loop.inner)
            took, waited = self.player.now - begun, self.exposed_s - exposed

    def _state(self) -> State:
        flights = [(flight.record, flight.latency, flight.transfer) for flight in self.player.flights]
        return flights, [record for _, record in (*self.player.queue, *self.player.copies)]


def _alike(one: State, other: State, within_s: float) -> bool:
    (flights, queue), (others, behind) = one, other
    if len(flights) != len(others) or len(queue) != len(behind):
        return False
    if not all(a is b for a, b in zip(queue, behind, strict=True)):
        return False
    return all(
        a is b and abs(latency - was) <= within_s and abs(transfer - moved) <= within_s
        for (a, latency, transfer), (b, was, moved) in zip(flights, others, strict=True)
    )
