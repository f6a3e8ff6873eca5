"""Fuse: one record where a tensor is written only to be read again by the next op of the block (torch-free).

``add_position`` writes the stream that ``modulate_norm`` then reads: as one record, ``position_modulate_norm``, the sum
is normed while it is still in registers. The records are fused after the builder has checked them and rematerialize
has cloned them, so gradients are counted on the sum and the norm apart, and a clone of the sum alone stays alone.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.program import Program
from ..ir.records import Op


def fuse(program: Program) -> Program:
    """Every position add whose first reader is a norm of the sum, nothing between them touching what both need."""
    ops: list[Op | None] = list(program.ops)
    for i, op in enumerate(program.ops):
        if op.kind == "add_position" and (j := _norm_behind(program, i)) is not None:
            norm = program.ops[j]
            inputs = (*op.inputs, *norm.inputs[1:])
            outputs = (*op.outputs, *norm.outputs)
            ops[i], ops[j] = None, replace(norm, kind="position_modulate_norm", inputs=inputs, outputs=outputs)
    return program.with_ops([op for op in ops if op is not None])


def _norm_behind(program: Program, i: int) -> int | None:
    """Where the norm stands that may take the position add ``i`` with it, if any."""
    add = program.ops[i]
    stored = program.span(add.outputs[0])
    read = {program.root(name)[0] for name in add.inputs}
    for j in range(i + 1, len(program.ops)):
        op = program.ops[j]
        if any(_meet(stored, program.span(name)) for name in (*op.inputs, *op.outputs)):
            return j if op.kind == "modulate_norm" and op.inputs[0] == add.outputs[0] else None
        if read & {program.root(name)[0] for name in op.outputs}:
            return None
    return None


def _meet(one: tuple[str, int, int], other: tuple[str, int, int]) -> bool:
    return one[0] == other[0] and one[1] < other[2] and other[1] < one[2]
