"""Prefetch: the gather of a unit is issued while the units before it are computed (torch-free)."""

from __future__ import annotations

from ..ir.layout import FSDP
from ..ir.program import Program
from ..ir.records import Op


def prefetch(program: Program) -> Program:
    """Move each unit gather's issue up to the wait of the gather ``plan.prefetch`` places before it.

    At most ``prefetch`` + 1 gathered units live at once: an issue stays behind the last read of the unit that is
    ``prefetch`` + 1 places before it (in backward, a unit's last read is its last weight's).
    """
    depth = program.plan.prefetch
    gathers = [i for i, op in enumerate(program.ops) if op.kind == "all_gather" and op.axes == FSDP]
    if depth == 0 or not gathers:
        return program
    last_read: dict[str, int] = {}
    for i, op in enumerate(program.ops):
        for name in op.inputs:
            last_read[program.root(name)[0]] = i
    moved: dict[int, list[Op]] = {}
    taken: set[int] = set()
    floor = 0
    for k, i in enumerate(gathers):
        if k == 0:
            continue
        behind = gathers[max(k - depth, 0)] + 1  # the wait of the gather ``depth`` places before, or of the first
        if k > depth:
            freed = program.root(program.ops[gathers[k - depth - 1]].outputs[0])[0]
            behind = max(behind, last_read[freed])
        behind = floor = max(behind, floor)
        if behind < i:
            moved.setdefault(behind, []).append(program.ops[i])
            taken.add(i)
    ops: list[Op] = []
    for i, op in enumerate(program.ops):
        if i not in taken:
            ops.append(op)
        ops.extend(moved.get(i, ()))
    return program.with_ops(ops)
