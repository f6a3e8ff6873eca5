"""What runs before a step is captured: each thing of it once, so that nothing sets itself up inside the capture.

Kernels are compiled and loaded when they are first launched, cuBLAS makes its workspace in its first product on a
stream, NCCL connects what an algorithm needs when a message first takes it. For that no step need run: of the records
that launch the same kernel (op, attributes, shapes, strides, alignment of addresses) one does, and of each kind of
collective of a communicator the smallest and the largest, since NCCL chooses the algorithm by size. Every rank runs the
same records in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.ops import OPS
from ..ir.collectives import FUSED
from ..ir.communicators import communicator_name
from ..ir.program import Program
from ..ir.records import BufferKind
from .executor import BoundRecord, Executor

ALIGNED_BYTES = 16  # Triton compiles another kernel for an address that is not a multiple of it


class Rehearsal:
    """Of the programs of one process, which share kernels and communicators: what one rehearsed, no other does."""

    def __init__(self) -> None:
        self._kernels = set[object]()
        self._sizes: dict[tuple[str, str], tuple[int, int]] = {}  # smallest and largest, by communicator and kind

    @torch.no_grad()
    def run(self, executor: Executor) -> list[str]:
        """Run on the current stream what was not before; the names of its records. Collective; states do not change.

        Temporaries are zeros at first: what a kernel does with them takes no longer, and indexes nothing.
        """
        program, records = executor.program, executor.records
        executor.arena.zero_()
        waits = {record.op.waits_for: record for record in records if record.op.is_wait}
        chosen = self.chosen(program, records)
        for record in chosen:
            if record.op.kind in OPS:
                _changing_no_state(program, record)
            record.run()
            if record.op.name in waits:
                waits[record.op.name].run()
        return [record.op.name for record in chosen]

    def chosen(self, program: Program, records: Sequence[BoundRecord]) -> list[BoundRecord]:
        """Those that are to run, in order; they count as rehearsed."""
        extremes = set[str]()
        for key, of_key in _collectives(program, records).items():
            low, high = self._sizes.get(key, (1 << 62, -1))
            smallest, largest = min(of_key), max(of_key)
            if smallest < low:
                extremes.add(of_key[smallest])
            if largest > high:
                extremes.add(of_key[largest])
            self._sizes[key] = min(low, smallest), max(high, largest)
        return [record for record in records if record.op.name in extremes or self._is_new(record)]

    def _is_new(self, record: BoundRecord) -> bool:
        """Whether it launches a kernel, or copies in a direction, that none before it did."""
        op = record.op
        if op.is_wait or not (op.kind in OPS or op.kind in FUSED or op.to is not None):
            return False
        parts = record.parts or (record,)
        key = tuple(
            (part.op.kind, part.op.to, _frozen(part.attrs), *map(_form, part.inputs), None, *map(_form, part.outputs))
            for part in parts
        )
        new = (op.kind, op.axes, key) not in self._kernels
        self._kernels.add((op.kind, op.axes, key))
        return new


def _collectives(program: Program, records: Sequence[BoundRecord]) -> dict[tuple[str, str], dict[int, str]]:
    """By communicator and kind: of each size in bytes, the first that is issued."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for op in (record.op for record in records):
        if op.axes and not op.is_wait and op.kind not in OPS and op.kind not in FUSED:
            size = max(program.bytes(name) for name in (*op.inputs, *op.outputs[:1]))
            found.setdefault((communicator_name(op.axes, op.kind), op.kind), {}).setdefault(size, op.name)
    return found


def _changing_no_state(program: Program, record: BoundRecord) -> None:
    """Of a record that writes a state: what it was handed is not finite, by its flag and its values, and is skipped."""
    kinds = [program.buffers[program.root(name)[0]].kind for name in (*record.op.inputs, *record.op.outputs)]
    given = len(record.inputs)
    if BufferKind.STATE not in kinds[given:]:
        return
    for kind, tensor in zip(kinds[:given], record.inputs, strict=True):
        if kind is BufferKind.TEMPORARY:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)


def _form(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.data_ptr() % ALIGNED_BYTES)


def _frozen(attrs: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((key, repr(value)) for key, value in sorted(attrs.items()))
