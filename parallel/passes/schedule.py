"""The schedule pass: when each collective is issued and waited for, and what is computed in between (torch-free).

A list scheduler on a simulated clock. It takes the records as they stand and a price for each, and gives them an order:

    issue    as soon as the inputs are there, unless its communicator is busy for longer than the next record runs:
             a collective that is issued and cannot start holds back all that are issued later
    wait     just before the first record that needs the result
    copy     to or from the host: where it stands, and it holds back nothing else
    compute  in the order of the builder; with ``plan.defer_weight_gradients`` weight gradients and what is made again
             leave it and run where the others would wait, as long as that takes no more memory

The start rule is the runtime's: a collective starts after all compute before its issue, after the previous collective
of its communicator, and after the start of every collective that was issued earlier. One order for all ranks: it
follows from the program and the prices alone.

[Note: windows] The order is found for one window at a time, from behind the self-attention of one block to behind that
of the next: there is nothing to hide in front of it. Weight gradients that need not run before the cut go with the
next window. Windows of equal records get equal orders, so that 48 blocks cost little more than two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from ..ir.collectives import FUSED
from ..ir.communicators import communicator
from ..ir.dependencies import accesses
from ..ir.program import Program
from ..ir.records import Phase
from .prices import Price
from .windows import Stretch, cuts, ends_reduction, follows_of, signature, temporaries


class ScheduleWindows:
    """A program's windows, and what must come before what in each.

    They serve every program of the same records, whatever its buffers measure and its records take.
    """

    def __init__(self, program: Program) -> None:
        self._program = program = delay_reductions(program)
        self._cuts = cuts(program)
        self._follows = follows_of(program, accesses(program))
        self._uses = [temporaries(program, op) for op in program.ops]
        self._total = Counter(root for roots in self._uses for root in roots)
        self._signatures: dict[tuple[int, ...], tuple[object, ...]] = {}
        self._made: dict[tuple[int, ...], Stretch] = {}

    def ordered(self, program: Program, price: Price) -> Program:
        """A program of these records, in the order in which they overlap best; ``price`` gives the seconds of one."""
        program = program.with_ops(self._program.ops)
        orders: dict[tuple[object, ...], list[int]] = {}
        placed: list[int] = []
        remaining, counted = dict(self._total), 0  # uses to come, behind so many that are placed

        def uses_left() -> dict[str, int]:
            nonlocal counted
            for i in placed[counted:]:
                for root in self._uses[i]:
                    remaining[root] -= 1
            counted = len(placed)
            return remaining

        start, carried = 0, list[int]()
        for stop in self._cuts:
            members = (*carried, *range(start, stop))
            to_the_end = stop == len(program.ops)
            key = (to_the_end, len(carried), self._signature(members))
            if key not in orders:
                window = self._window(members)
                memory = partial(_Memory, program, window.uses, len(carried), self._total, uses_left)
                orders[key] = _Scheduler(program, window, price, memory).order(to_the_end=to_the_end)
            order = orders[key]
            placed += [members[i] for i in order]
            carried = [members[i] for i in sorted(set(range(len(members))).difference(order))]
            start = stop
        return program.with_ops([program.ops[i] for i in placed])

    def _signature(self, members: tuple[int, ...]) -> tuple[object, ...]:
        if members not in self._signatures:
            self._signatures[members] = signature([self._program.ops[i] for i in members])
        return self._signatures[members]

    def _window(self, members: tuple[int, ...]) -> Stretch:
        if members not in self._made:
            uses = [self._uses[i] for i in members]
            self._made[members] = Stretch(self._program, [self._program.ops[i] for i in members], uses, self._follows)
        return self._made[members]


def delay_reductions(program: Program) -> Program:
    """Wait for the reduction of a unit's gradient only when it must: see ``grad_units``.

    That is, before the first write of the gradient ``grad_units`` places later, or before the result is read. Adding
    it to the sum over micro-batches moves along, and so does the sum over replicas.
    """
    bound = program.plan.grad_units
    touched = accesses(program)
    waits = [i for i, op in enumerate(program.ops) if ends_reduction(program, op)]
    firsts = [touched[program.root(program.ops[i].inputs[1])[0]][0] for i in waits]
    moved: dict[int, list[int]] = {}
    limit = next((i for i, op in enumerate(program.ops) if op.place.phase is Phase.UPDATE), len(program.ops))
    for k, i in enumerate(waits):
        behind, shard = [i], program.root(program.ops[i].outputs[0])[0]
        for j in range(i + 1, len(program.ops)):
            op = program.ops[j]
            if not (op.kind == "accumulate" or op.axes == ("dp_replicate",)) or shard not in temporaries(program, op):
                break
            shard = program.root(op.outputs[0])[0]
            behind.append(j)
        target = min(firsts[k + bound] if k + bound < len(waits) else limit, limit)
        if target > behind[-1] + 1:
            moved.setdefault(target, []).extend(behind)
    return program.reordered(moved)


@dataclass
class _Clock:
    """When compute and every communicator are free, and when the collective issued last has started."""

    now: float = 0.0
    free: dict[str, float] = field(default_factory=dict)
    last_start: float = 0.0

    def copy(self, name: str, seconds: float) -> float:
        """When a copy to or from the host ends: only those of its own way are before it."""
        self.free[name] = max(self.now, self.free.get(name, 0.0)) + seconds
        return self.free[name]

    def issue(self, name: str, seconds: float) -> float:
        """When a collective ends."""
        self.last_start = max(self.now, self.free.get(name, 0.0), self.last_start)
        self.free[name] = self.last_start + seconds
        return self.free[name]


class _Memory:
    """Live bytes of a window, counted from what is alive at its start for others than the records carried into it."""

    def __init__(
        self,
        program: Program,
        uses: list[list[str]],
        carried: int,
        total: dict[str, int],
        uses_left: Callable[[], dict[str, int]],
    ) -> None:
        self.uses, remaining = uses, uses_left()
        here = Counter(root for roots in uses for root in roots)
        self.bytes = {root: program.bytes(root) for root in here}
        self.begins = {root for root in here if remaining[root] == total[root]}
        self.left = {root: count for root, count in here.items() if remaining[root] == count}
        inherited = {root for roots in uses[:carried] for root in roots} - self.begins
        self.live = sum(self.bytes[root] for root in inherited if root in self.left)
        start = (self.live, set(self.begins), dict(self.left))
        self.most = self.live
        for i in range(len(uses)):  # in the order of the builder
            self.most = max(self.most, self.live + self.wanted(i))
            self.run(i)
        self.live, self.begins, self.left = start

    def wanted(self, i: int) -> int:
        """Bytes that record ``i`` would allocate."""
        return sum(self.bytes[root] for root in self.uses[i] if root in self.begins)

    def run(self, i: int) -> None:
        self.live += self.wanted(i)
        self.begins.difference_update(self.uses[i])
        for root in self.uses[i]:
            if root in self.left:
                self.left[root] -= 1
                if self.left[root] == 0:
                    self.live -= self.bytes[root]


class _Scheduler:
    """The list scheduler of one stretch, as if nothing were in flight at its start."""

    def __init__(self, program: Program, window: Stretch, price: Price, memory: Callable[[], _Memory]) -> None:
        self.ops, self.before, self.after, self.is_wait = window.ops, window.before, window.after, window.is_wait
        self.window, self.new_memory = window, memory
        self.memory: _Memory | None = None  # counted where there is a choice between records
        self.seconds = [price(program, op) for op in window.ops]
        self.rank = [0.0] * len(window.ops)
        for i in reversed(range(len(window.ops))):
            self.rank[i] = self.seconds[i] + max([self.rank[k] for k in self.after[i]], default=0.0)

    def order(self, *, to_the_end: bool) -> list[int]:
        """Positions of the window's records, in their new order.

        Unless ``to_the_end``, what may still be put off when the chain of compute is done is left to the next window.
        """
        self.clock = _Clock()
        self.missing = [len(needed) for needed in self.before]
        self.release = [0.0] * len(self.ops)  # when what it waits for has arrived
        self.ends: dict[str, float] = {}
        self.done: list[int] = []
        self.emitted: set[int] = set()
        self.ready: set[int] = set()
        self.issues: set[int] = set()
        self.reductions: list[int] = []  # waits of theirs: taken as soon as they are over, they free their gradients
        chain = sum(self.window.in_chain)
        for i in range(len(self.ops)):
            if not self.before[i]:
                self._arrive(i)
        while self.ready or self.issues if to_the_end else chain:
            if not self.ready:
                self._issue(self._first_issue())
                continue
            chosen = self._choose()
            begin = max(self.clock.now, self.release[chosen])
            self._take_reductions()
            self._issue_until(begin + self.seconds[chosen])
            self._emit(chosen)
            chain -= self.window.in_chain[chosen]
        if to_the_end:
            for i in range(len(self.ops)):
                if self.is_wait[i] and i not in self.emitted:
                    self._emit_wait(i)
        return self.done

    def _arrive(self, i: int) -> None:
        """All before ``i`` is done, or is a wait that will be done first. A wait is passed on: it comes last."""
        if self.is_wait[i]:
            if self.window.ends_reduction[i]:
                self.reductions.append(i)
            end = self.ends.get(self.ops[i].waits_for, 0.0)
            for k in self.after[i]:
                self.release[k] = max(self.release[k], end)
            self._pass_on(i)
        elif self.ops[i].to is not None:
            self._issue(i)
        elif self.window.is_issue[i]:
            self.issues.add(i)
        else:
            self.ready.add(i)

    def _pass_on(self, i: int) -> None:
        for k in self.after[i]:
            self.missing[k] -= 1
            if self.missing[k] == 0:
                self._arrive(k)

    def _choose(self) -> int:
        """The record that most depends on, of those that need not wait and for which there is memory."""
        able = [i for i in self.ready if self.release[i] <= self.clock.now]
        if not able:
            return min(self.ready, key=lambda i: (self.release[i], -self.rank[i], i))
        if len(able) > 1:
            memory = self._memory_now()
            fitting = [i for i in able if memory.live + memory.wanted(i) <= memory.most]
            if fitting:
                return min(fitting, key=lambda i: (-self.rank[i], i))
            return min(able)
        return able[0]

    def _memory_now(self) -> _Memory:
        if self.memory is None:
            self.memory = self.new_memory()
            for i in self.done:
                self.memory.run(i)
        return self.memory

    def _first_issue(self) -> int:
        return min(self.issues, key=lambda i: (max(self.release[i], self.clock.now), -self.rank[i], i))

    def _take_reductions(self) -> None:
        for i in self.reductions:
            if i not in self.emitted and self.ends.get(self.ops[i].waits_for, 0.0) <= self.clock.now:
                self._emit_wait(i)

    def _issue_until(self, end: float) -> None:
        """Issue what can start before ``end``, and for which compute need not wait: its input may be on its way."""
        for i in sorted(self.issues, key=lambda i: (-self.rank[i], i)):
            if self.release[i] <= self.clock.now and self.clock.free.get(communicator(self.ops[i]), 0.0) <= end:
                self._issue(i)

    def _issue(self, i: int) -> None:
        self.issues.discard(i)
        self._emit_waits_before(i)
        start = self.clock.issue if self.ops[i].to is None else self.clock.copy
        self.ends[self.ops[i].name] = start(communicator(self.ops[i]), self.seconds[i])
        self._account(i)
        self._pass_on(i)

    def _emit(self, i: int) -> None:
        self.ready.discard(i)
        self._emit_waits_before(i)
        op, seconds = self.ops[i], self.seconds[i]
        self.clock.now = max(self.clock.now, self.release[i])
        self.clock.now = self.clock.issue(op.lane, seconds) if op.kind in FUSED else self.clock.now + seconds
        self._account(i)
        self._pass_on(i)

    def _emit_waits_before(self, i: int) -> None:
        for k in sorted(self.before[i]):
            if self.is_wait[k] and k not in self.emitted:
                self._emit_wait(k)

    def _emit_wait(self, i: int) -> None:
        self._emit_waits_before(i)
        self.clock.now = max(self.clock.now, self.ends.get(self.ops[i].waits_for, 0.0))
        self._account(i)

    def _account(self, i: int) -> None:
        self.emitted.add(i)
        self.done.append(i)
        if self.memory is not None:
            self.memory.run(i)
