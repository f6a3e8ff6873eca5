"""Fuse over tp: a gather and the products behind it, a product and its reduce-scatter, as one record (torch-free).

    gather_matmul     xg = all_gather_tp(x), y = xg W for one or more W      inputs x, W...       outputs xg, y...
    matmul_scatter    out = reduce_scatter_tp(y W [+ z])                      inputs y, W [, z]    outputs out, y W

Such a record runs on the compute lane and holds the communicator of tp. On gloo it is its parts, one after the other.
On CUDA it is pipelined rank by rank by torch's symmetric memory: what torch calls async tensor parallelism.

The pass stands behind the builder, which has checked the parts one by one, and behind rematerialize, which clones them
one by one: a gather that backward makes again without its product stays a plain gather.

[Note: what hides] R ranks, products of C seconds, a collective of W seconds; c = C / R and w = W / (R - 1). A gather
multiplies its own rows first, while those of the next rank come in: rank k's rows are there after k w, and R - k
products follow, hence max over k of k w + (R - k) c, which is largest at an end: max(C, W + c). A reduce-scatter makes
other ranks' rows first and its own last, the same in reverse. What can never hide is one rank's product or, where
products are longer, nothing. Not in the formula: the barriers, and copies in this rank's own memory.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

from ..ir.collectives import FUSED
from ..ir.layout import HEADS
from ..ir.program import Program
from ..ir.records import Collective, Fused, Op

_WAYS = {collective: fused for fused, collective in FUSED.items()}


def pipelined_s(compute_s: float, communication_s: float, ranks: int) -> float:
    """Seconds of a fused record, see [Note: what hides]."""
    return max(compute_s, communication_s + compute_s / ranks)


def fuse_tp(program: Program) -> Program:
    """Every gather over tp with the products that follow it, every product with the reduce-scatter that follows.

    A product whose result travels on ends the run: what follows can hide that. Left alone is what something else reads
    or writes in between.
    """
    found = _Finder(program)
    changed: dict[int, Op] = {}
    taken: set[int] = set()
    for i, op in enumerate(program.ops):
        if isinstance(op.comm, Collective) and op.kind in _WAYS and op.axes == HEADS and op.comm.dim == 0:
            at = found.behind_gather(i) if op.kind == "all_gather" else found.before_scatter(i)
            if at and not taken.intersection(at):
                taken.update(at)
                place = at[2] if op.kind == "all_gather" else at[0]  # where its first product stands
                changed[place] = _record(op, [program.ops[k] for k in at])
    ops = [changed.get(i, op) for i, op in enumerate(program.ops) if i in changed or i not in taken]
    return program.with_ops(ops)


def _record(issue: Op, parts: list[Op]) -> Op:
    wait = next(part for part in parts if part.is_wait)
    products = [part for part in parts if part.kind == "matmul"]
    results = tuple(product.outputs[0] for product in products)
    if issue.kind == "all_gather":
        inputs = (issue.inputs[0], *(product.inputs[1] for product in products))
    else:
        inputs = products[0].inputs
    assert isinstance(issue.comm, Collective)
    fused = Fused(issue.axes, issue.comm.dim, tuple(parts))
    return replace(issue, kind=_WAYS[issue.kind], inputs=inputs, outputs=(wait.outputs[0], *results), comm=fused)


class _Finder:
    """Positions that may become one record."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.touched: dict[str, list[int]] = {}
        self.written: dict[str, list[int]] = {}
        self.wait_of: dict[str, int] = {}
        for i, op in enumerate(program.ops):
            for root in program.storages(op):
                self.touched.setdefault(root, []).append(i)
            for root in {program.root(name)[0] for name in op.outputs}:
                self.written.setdefault(root, []).append(i)
            if op.is_wait:
                self.wait_of[op.waits_for] = i

    def _touching(self, name: str) -> list[int]:
        return self.touched[self.program.root(name)[0]]

    def behind_gather(self, i: int) -> list[int]:
        """Issue, wait and products; nothing where there is no product."""
        ops, issue = self.program.ops, self.program.ops[i]
        wait = self.wait_of[issue.name]
        readers = [k for k in self._touching(issue.outputs[0]) if k > wait]
        products: list[int] = []
        for k in readers:
            behind = not products or k == products[-1] + 1
            if not (behind and ops[k].inputs[0] == ops[wait].outputs[0] and self._by_rows(ops[k], added=False)):
                break
            products.append(k)
            if self._travels(k):
                break
        if not products:
            return []
        source = self.written.get(self.program.root(issue.inputs[0])[0], [])
        overwritten = bisect_left(source, i) < bisect_left(source, products[0])
        return [] if overwritten else [i, wait, *products]

    def before_scatter(self, i: int) -> list[int]:
        """Product, issue and wait; nothing where its input is no product, or is read by others as well."""
        ops, issue = self.program.ops, self.program.ops[i]
        wait = self.wait_of[issue.name]
        partial = self._touching(issue.inputs[0])
        at = partial.index(i)
        product = partial[at - 1] if at else i
        if ops[product].outputs != issue.inputs[:1] or not self._by_rows(ops[product], added=True):
            return []
        alone = set(partial[at:]) <= {i, wait}
        free = not any(product < k < wait and k != i for k in self._touching(issue.outputs[0]))
        return [product, i, wait] if alone and free else []

    def _by_rows(self, op: Op, *, added: bool) -> bool:
        """Whether it is a product of one dtype that a rank's rows of the first factor make a rank's rows of."""
        if op.kind != "matmul" or not len(op.inputs) <= 2 + added:
            return False
        buffers = [self.program.buffers[name] for name in (*op.inputs, *op.outputs)]
        labels = self.program.label_signature(op)
        rows = labels.inputs[0][0] == labels.outputs[0][0] and labels.inputs[0][0] not in labels.inputs[1]
        return rows and len({b.dtype for b in buffers}) == 1 and all(b.strides is None for b in buffers)

    def _travels(self, i: int) -> bool:
        """Whether the next that reads a product sends it."""
        behind = [k for k in self._touching(self.program.ops[i].outputs[0]) if k > i]
        return bool(behind) and self.program.ops[behind[0]].comm is not None
