"""Elide: collectives over one rank become aliases (torch-free)."""

from __future__ import annotations

from ..ir.program import Program
from ..ir.records import Buffer, Op, altered


def elide(program: Program) -> Program:
    """Collectives over a group of one rank move nothing: their result becomes an alias of their input.

    Where the result was to be written into a given place (a unit's part of the flat gradient), it is copied there.
    """
    ops: list[Op] = []
    aliases: dict[str, Buffer] = {}
    for op in program.ops:
        if op.comm is None or program.plan.size(op.axes) > 1:
            ops.append(op)
            continue
        if op.is_wait:
            continue
        issued, source = program.buffers[op.outputs[0]], op.inputs[0]
        if issued.base is None:
            aliases[issued.name] = altered(issued, base=source)
        elif issued.base != source:  # a place of its own; an all-reduce in place needs nothing
            ops.append(altered(op, kind="copy", attrs={"signature": "xn->xn"}, comm=None))
    return program.with_ops(ops, aliases)
