"""Passes that change the order of records, not their meaning (torch-free).

prefetch         issues the gather of a unit while the units before it are computed
elide            turns collectives over one rank into aliases
stage_for_gloo   lists the staging buffer that gloo's reduce-scatter needs
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.collectives import FUSED
from ..ir.layout import FSDP
from ..ir.program import Buffer, Op, Program, lane_name


def prefetch(program: Program) -> Program:
    """Move each unit gather's issue up to the wait of the gather ``plan.prefetch`` places before it.

    At most ``prefetch`` + 1 gathered units live at once: an issue stays behind the last read of the unit that is
    ``prefetch`` + 1 places before it (in backward, a unit's last read is its last weight's).
    """
    depth = program.plan.prefetch
    lane = lane_name(FSDP)
    gathers = [i for i, op in enumerate(program.ops) if op.kind == "all_gather" and op.lane == lane]
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


def elide(program: Program) -> Program:
    """Collectives over a group of one rank move nothing: their result becomes an alias of their input.

    Where the result was to be written into a given place (a unit's part of the flat gradient), it is copied there.
    """
    ops: list[Op] = []
    changed: dict[str, Buffer] = {}
    for op in program.ops:
        if "axes" not in op.attrs or program.plan.size(op.axes) > 1:
            ops.append(op)
            continue
        if op.kind == "wait":
            continue
        issued, source = program.buffers[op.outputs[0]], op.inputs[0]
        if issued.base is None:
            changed[issued.name] = replace(issued, base=source)
        elif issued.base != source:  # a place of its own; an all-reduce in place needs nothing
            ops.append(
                Op(
                    op.name,
                    "copy",
                    op.inputs,
                    op.outputs,
                    {"signature": "xn->xn"},
                    "compute",
                    op.region,
                    op.of,
                    op.clone,
                )
            )
    return program.with_ops(ops, changed)


def stage_for_gloo(program: Program) -> Program:
    """Gloo does a reduce-scatter as all-to-all plus a sum in rank order: one staging buffer as large as the input."""
    extra: dict[str, Buffer] = {}
    staged: dict[str, str] = {}

    def stage(op: Op) -> Op:
        if op.kind in FUSED:
            parts = tuple(stage(part) for part in op.parts)
            names = (staged[part.name] for part in parts if part.name in staged)
            return replace(op, outputs=(*op.outputs, *names), attrs={**op.attrs, "parts": parts})
        if op.kind == "reduce_scatter":
            name = f"{op.name}.staging"
            extra[name] = replace(program.buffers[op.inputs[0]], name=name, base=None, offset=0, kind="temporary")
            staged[op.name] = name
            return replace(op, outputs=(*op.outputs, name))
        if op.kind == "wait" and op.attrs["issue"] in staged:
            return replace(op, inputs=(*op.inputs, staged[op.attrs["issue"]]))
        return op

    ops = [stage(op) for op in program.ops]
    return program.with_ops(ops, extra)
