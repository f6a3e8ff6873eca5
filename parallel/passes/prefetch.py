"""Prefetch: the gather of a unit is issued while the units before it are computed (torch-free)."""

from __future__ import annotations

from itertools import groupby

from ..ir.layout import FSDP
from ..ir.program import Program


def prefetch(program: Program) -> Program:
    """Move each unit gather's issue up to the wait of the gather ``plan.prefetch`` places before it.

    A unit of which a part is frozen is two gathers, which move together. At most ``prefetch`` + 1 gathered units live
    at once: an issue stays behind the last read of the unit that is ``prefetch`` + 1 places before it (in backward, a
    unit's last read is its last weight's).
    """
    depth = program.plan.prefetch
    all_gathers = (i for i, op in enumerate(program.ops) if op.kind == "all_gather" and op.axes == FSDP)
    gathers = [list(group) for _, group in groupby(all_gathers, lambda i: program.ops[i].place)]
    if depth == 0 or not gathers:
        return program
    last_read: dict[str, int] = {}
    for i, op in enumerate(program.ops):
        for name in op.inputs:
            last_read[program.root(name)[0]] = i
    moved: dict[int, list[int]] = {}
    floor = 0
    for k, group in enumerate(gathers):
        if k == 0:
            continue
        # Behind the wait of the last gather ``depth`` places before, or of the first place.
        floor = max(floor, gathers[max(k - depth, 0)][-1] + 1)
        if k > depth:
            freed = [program.root(program.ops[i].outputs[0])[0] for i in gathers[k - depth - 1]]
            floor = max(floor, *(last_read[root] for root in freed))
        for i in group:
            if floor < i:
                moved.setdefault(floor + 1, []).append(i)
    return program.reordered(moved)
