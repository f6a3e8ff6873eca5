"""Where a program tells how far it is: which of its records a mark stands before, and whether each does (torch-free).

[Note: marks] A mark is a record that writes its own position where a watchdog looks, in memory of the host: all records
up to it are done. In a CUDA Graph's replay the host issues nothing, and nothing else would tell. They stand

    before a wait, or a fused record    where a rank may wait for others: who stands there is told from who is past it
    before a place's first record       of a block's forward or backward, the update and so on: what it computes there
    at the end                          all is done

and nowhere else. None is needed behind a wait: what follows it up to the next mark only computes, and who is held up
there is past a collective that the others have left. None is needed at an issue, where a stream holds nothing up:
whether a rank has issued what others wait for follows from the wait or the computation at which it stands itself. One
slot serves all streams, that of compute: every collective ends in a wait there.
"""

from __future__ import annotations

from collections.abc import Sequence

from .collectives import FUSED
from .program import Program
from .records import MARK, Op

MARK_NUMBERS, MARK_SLOT = "marks.numbers", "marks.slot"  # what marks write, and where


def to_mark(ops: Sequence[Op]) -> list[int]:
    """Positions of the records that a mark stands before, in order; the last is that behind all of them."""
    found: list[int] = []
    begun: set[object] = set()
    for i, op in enumerate(ops):
        if op.kind == MARK:
            continue
        place = (op.place.phase, op.place.micro_batch, op.place.block)
        if op.is_wait or op.kind in FUSED or (op.comm is None and place not in begun):
            found.append(i)
        if op.comm is None:
            begun.add(place)
    return [*found, len(ops)]


def is_marked(program: Program) -> bool:
    """Whether its own records tell how far it is."""
    return MARK_SLOT in program.buffers


def mark_faults(program: Program) -> list[tuple[Op, str]]:
    """Records that lack a mark, and marks that stand, or write, what they should not."""
    if not is_marked(program):
        return []
    ops, found, last = program.ops, list[tuple[Op, str]](), -1
    for i in to_mark(ops):
        if i == 0 or ops[i - 1].kind != MARK:
            found.append((ops[min(i, len(ops) - 1)], "no mark stands before it" if i < len(ops) else "no mark ends it"))
    for i, op in enumerate(ops):
        if op.kind != MARK:
            continue
        if op.before != i + 1:
            found.append((op, f"stands before record {i + 1}, and is that of record {op.before}"))
        root, number = program.root(op.inputs[0])
        if (root, program.root(op.outputs[0])[0]) != (MARK_NUMBERS, MARK_SLOT) or number != i:
            found.append((op, f"is record {i}, and writes {number} of {root} to {op.outputs[0]}"))
        if number <= last:
            found.append((op, f"writes {number} behind {last}: a step would be told to go back"))
        last = number
    return found
