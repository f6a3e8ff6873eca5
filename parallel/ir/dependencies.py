"""Which record must come before which: what a pass that moves records has to keep (torch-free).

A record depends on the last writers of what it reads, and on the last writers and readers of what it writes. A
collective holds its input and its output from its issue to its wait: the wait counts as a reader of the one and as the
writer of the other. Elements are compared, not names: views of one storage that share none are independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .layout import FSDP, TOKENS_GATHERED, Axes
from .program import Program
from .records import Op

Extent = tuple[int, int, int]  # first element, behind the last, position of the record


def dependencies(program: Program, ops: Sequence[Op]) -> list[set[int]]:
    """For each of ``ops``, which stand in a correct order, the positions of those that must stay before it."""
    writers: dict[str, list[Extent]] = {}
    readers: dict[str, list[Extent]] = {}
    issued: dict[str, int] = {}
    before: list[set[int]] = []
    for i, op in enumerate(ops):
        needed: set[int] = set()
        if op.is_wait:
            if (issue := issued.get(op.waits_for)) is not None:
                needed.add(issue)
        elif op.comm is not None:
            issued[op.name] = i
        read = [program.span(name) for name in op.inputs]
        written = [program.span(name) for name in op.outputs]
        for root, first, last in read:
            needed.update([k for a, z, k in writers.get(root, ()) if a < last and first < z])
        for root, first, last in written:
            for table in (writers, readers):
                needed.update([k for a, z, k in table.get(root, ()) if a < last and first < z])
        for root, first, last in read:
            readers.setdefault(root, []).append((first, last, i))
        for root, first, last in written:  # what it covers whole needs to be remembered no more
            for table in (writers, readers):
                if root in table:
                    table[root] = [s for s in table[root] if not (first <= s[0] and s[1] <= last) or s[2] == i]
            writers.setdefault(root, []).append((first, last, i))
        needed.discard(i)
        before.append(needed)
    return before


def accesses(program: Program) -> dict[str, tuple[int, int]]:
    """Storage -> the positions of the first and the last record that touches it."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, op in enumerate(program.ops):
        for root in program.storages(op):
            first.setdefault(root, i)
            last[root] = i
    return {root: (i, last[root]) for root, i in first.items()}


def families(program: Program) -> Iterable[tuple[int, list[str]]]:
    """(most that live at once, storages in order): units, their gradients, head slices of K and V, of dK and dV.

    What bounds them is a matter of the plan: the next but (bound - 1) may not be made before the one has been read.
    """
    plan = program.plan
    bounds = {
        ("all_gather", FSDP): plan.prefetch + 1,
        ("reduce_scatter", FSDP): plan.grad_units,
        ("all_gather", TOKENS_GATHERED): max(2, plan.kv_slices, plan.kv_chunks) if plan.kv_first else 2,
        ("reduce_scatter", TOKENS_GATHERED): 2,
    }
    members: dict[tuple[str, Axes], list[str]] = {key: [] for key in bounds}
    for op in program.ops:
        key = (op.kind, op.axes)
        if key in members:
            buffer = op.outputs[0] if op.kind == "all_gather" else op.inputs[0]
            members[key].append(program.root(buffer)[0])
    return [(bounds[key], storages) for key, storages in members.items()]
