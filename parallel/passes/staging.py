"""Staging: buffers that a backend needs beside the records' own, listed like any other (torch-free)."""

from __future__ import annotations

from dataclasses import replace

from ..ir.layout import replicated
from ..ir.program import Program
from ..ir.records import Buffer, BufferKind, Fused, Op

SYMMETRIC = "tp.symmetric"  # the buffer through which ranks read each other's rows


def stage_for_gloo(program: Program) -> Program:
    """Gloo does a reduce-scatter as all-to-all plus a sum in rank order: one staging buffer as large as the input."""
    extra: dict[str, Buffer] = {}
    staged: dict[str, str] = {}

    def stage(op: Op) -> Op:
        if isinstance(op.comm, Fused):
            parts = tuple(stage(part) for part in op.parts)
            names = (staged[part.name] for part in parts if part.name in staged)
            return replace(op, outputs=(*op.outputs, *names), comm=replace(op.comm, parts=parts))
        if op.kind == "reduce_scatter":
            made = _staging(op, program.buffers[op.inputs[0]])
            extra[made.name], staged[op.name] = made, made.name
            return replace(op, outputs=(*op.outputs, made.name))
        if op.is_wait and op.waits_for in staged:
            return replace(op, inputs=(*op.inputs, staged[op.waits_for]))
        return op

    ops = [stage(op) for op in program.ops]
    return program.with_ops(ops, extra)


def _staging(op: Op, like: Buffer) -> Buffer:
    """A storage of its own, as large as another buffer."""
    return replace(like, name=f"{op.name}.staging", base=None, offset=0, kind=BufferKind.TEMPORARY)


def stage_symmetric(program: Program) -> Program:
    """What torch's symmetric memory needs beside the records' own buffers, listed.

    One buffer that every fused record uses, one after the other on the compute lane, mapped by all ranks of a tp group:
    this rank's rows of a gather, or two ranks' rows of what is to be reduced. It is no part of the arena. Where a
    product is added to something, the received parts need a place of their own: the sum cannot be made in place.
    """
    if not program.plan.fused_tp:
        return program
    extra: dict[str, Buffer] = {}
    ops: list[Op] = []
    rows = 0
    for op in program.ops:
        if op.kind == "gather_matmul":
            rows = max(rows, program.local_elements(op.inputs[0]))
        elif op.kind == "matmul_scatter":
            rows = max(rows, 2 * program.local_elements(op.outputs[0]))
            if len(op.inputs) > 2:
                made = _staging(op, program.buffers[op.outputs[1]])
                extra[made.name] = made
                op = replace(op, outputs=(*op.outputs, made.name))
        ops.append(op)
    if rows:
        dtype = program.plan.compute_dtype
        extra[SYMMETRIC] = Buffer(SYMMETRIC, (rows,), dtype, replicated(1), BufferKind.WORKSPACE)
    return program.with_ops(ops, extra)
