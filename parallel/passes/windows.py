"""Windows of the schedule pass: where they end, what they are, and what must come before what (torch-free).

See [Note: windows] in ``schedule.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...kernels.ops import OPS
from ..ir.communicators import communicator
from ..ir.dependencies import dependencies, families
from ..ir.layout import FSDP, HEADS, TOKENS_GATHERED
from ..ir.program import Program
from ..ir.records import COMPUTE_LANE, BufferKind, Holds, Op, Place, Slice, Space


def cuts(program: Program) -> list[int]:
    """Where windows end: behind the last self-attention record of a block's forward or backward, and at the end."""
    last: dict[tuple[Place, str], int] = {}
    for i, op in enumerate(program.ops):
        if op.kind in ("attention", "attention_backward") and not op.clone:
            last[op.place, op.kind] = i + 1
    return [*sorted(last.values()), len(program.ops)]


def signature(window: Sequence[Op]) -> tuple[object, ...]:
    """What the records are, blocks and micro-batches counted from those of the last record in a block."""
    last = next((op.place for op in reversed(window) if op.place.block is not None), Place())
    mb, block = last.micro_batch or 0, last.block or 0
    facts: list[object] = []
    for op in window:
        place = op.place
        layer = None if place.block is None else place.block - block
        micro_batch = None if place.micro_batch is None else place.micro_batch - mb
        facts.append((micro_batch, layer, place.phase, op.role, op.slice, op.clone, op.kind))
    return tuple(facts)


def follows_of(program: Program, touched: dict[str, tuple[int, int]]) -> dict[str, str]:
    """Storage -> the one of its family that must have been read before this one is made."""
    return {
        later: earlier
        for bound, storages in families(program)
        for earlier, later in zip(storages, storages[bound:], strict=False)
        if touched[earlier][1] < touched[later][0]
    }


def temporaries(program: Program, op: Op) -> list[str]:
    """Storages of the device that a record touches and that do not outlive the step."""
    found = [(root, program.buffers[root]) for root in program.storages(op)]
    return [root for root, whole in found if whole.kind is BufferKind.TEMPORARY and whole.space is Space.DEVICE]


def ends_reduction(program: Program, op: Op) -> bool:
    """Whether it waits for the reduction of a unit's gradient."""
    if not op.is_wait or op.axes != FSDP:
        return False
    return program.buffers[op.inputs[1]].placement.partial != program.buffers[op.outputs[0]].placement.partial


class Stretch:
    """One stretch of records, those left over from the one before in front, and what must come before what."""

    def __init__(self, program: Program, ops: list[Op], uses: list[list[str]], follows: dict[str, str]) -> None:
        self.program, self.ops, self.uses = program, ops, uses
        self.is_wait = [op.is_wait for op in ops]
        self.is_issue = [op.is_issue for op in ops]
        self.ends_reduction = [ends_reduction(program, op) for op in ops]
        self.before = dependencies(program, ops)
        self.in_chain: list[bool] = []
        self._chain()
        self._hold_clones()
        self._hold_back(follows)
        if program.plan.kv_first:
            self._units_behind_kv()
        self.after: list[list[int]] = [[] for _ in ops]
        for i, needed in enumerate(self.before):
            for k in needed:
                self.after[k].append(i)

    def _chain(self) -> None:
        """Compute keeps its order, but for what may be deferred; so do the collectives of units.

        Copies to and from the host stay where they stand in it: memory hangs on their waits.
        """
        defer = self.program.plan.defer_weight_gradients
        last: dict[str | Slice, int] = {}
        for i, op in enumerate(self.ops):
            line: str | Slice | None
            if op.to is not None:
                line = COMPUTE_LANE
            elif self.is_wait[i]:
                line = None
            elif op.slice and not op.clone and op.kind in OPS and OPS[op.kind].token_local:
                line = op.slice  # one slice may wait for its sum over tp while another is multiplied
            elif self.is_issue[i]:
                line = communicator(op) if op.axes == FSDP else None
            else:
                line = None if defer and (op.clone or self._is_weight_gradient(op)) else COMPUTE_LANE
            self.in_chain.append(line == COMPUTE_LANE and op.to is None)
            if line is not None:
                if line in last:
                    self.before[i].add(last[line])
                last[line] = i

    def _hold_clones(self) -> None:
        """What is made again moves up by at most two collectives over tp: until it is read it takes memory."""
        passed: list[int] = []
        for i, op in enumerate(self.ops):
            if self.is_wait[i]:
                continue
            if op.clone and op.axes in ((), HEADS) and len(passed) > 1:
                self.before[i].add(passed[-2])
            elif op.axes == HEADS and not op.clone and (op.slice is None or op.slice.index == 0):  # slices are one
                passed.append(i)

    def _units_behind_kv(self) -> None:
        """A unit's gather is issued behind those of K and V that do not need it: see ``kv_first``."""
        gathers = [i for i, op in enumerate(self.ops) if self.is_issue[i] and op.kind == "all_gather"]
        kv = [i for i in gathers if self.ops[i].axes == TOKENS_GATHERED]
        needed, stack = set[int](), list(kv)
        while stack:
            new = self.before[stack.pop()] - needed
            needed |= new
            stack.extend(new)
        for i in gathers:
            if self.ops[i].axes == FSDP and i not in needed:
                self.before[i].update(kv)

    def _hold_back(self, follows: dict[str, str]) -> None:
        """Nothing touches a storage before the one that it follows was read for the last time."""
        users: dict[str, list[int]] = {}
        for i, roots in enumerate(self.uses):
            for root in roots:
                self.before[i].update(users.get(follows.get(root, ""), ()))
                users.setdefault(root, []).append(i)

    def _is_weight_gradient(self, op: Op) -> bool:
        """A product written into a unit's flat gradient."""
        root, _ = self.program.root(op.outputs[0])
        return op.kind == "matmul" and self.program.buffers[root].holds is Holds.UNIT_GRADIENT
