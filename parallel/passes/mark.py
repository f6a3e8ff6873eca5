"""Mark: records that tell a watchdog how far a step is, where no host runs it (torch-free).

The last pass, since a mark writes its position. [Note: marks] of ``ir/marks.py`` says where they stand and why there.
"""

from __future__ import annotations

from ..ir.layout import replicated
from ..ir.marks import MARK_NUMBERS, MARK_SLOT, to_mark
from ..ir.program import Program
from ..ir.records import MARK, Buffer, BufferKind, Op, Space


def mark(program: Program) -> Program:
    """The same records, and before some of them marks: 8 bytes each, into a slot of the host's memory."""
    ops: list[Op] = []
    wanted = to_mark(program.ops)
    scalar, numbers = replicated(1), len(program.ops) + len(wanted)
    extra = {
        MARK_NUMBERS: Buffer(MARK_NUMBERS, (numbers,), "int64", scalar, BufferKind.STATE),
        MARK_SLOT: Buffer(MARK_SLOT, (1,), "int64", scalar, BufferKind.STATE, space=Space.HOST),
    }
    start = 0
    for stop in wanted:
        ops += program.ops[start:stop]
        at, place = len(ops), program.ops[min(stop, len(program.ops) - 1)].place
        number = f"{MARK_NUMBERS}.{at}"
        extra[number] = Buffer(number, (1,), "int64", scalar, BufferKind.STATE, MARK_NUMBERS, at, place=place)
        ops.append(Op(f"mark.{at}", MARK, (number,), (MARK_SLOT,), place=place, role=MARK, before=at + 1))
        start = stop
    return program.with_ops(ops, extra)
