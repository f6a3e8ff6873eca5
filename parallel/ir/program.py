"""A training step as a program: records in order, and what their buffers measure on one rank (torch-free)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from ...kernels.counts import DTYPE_BYTES, Operand, Operands
from ...kernels.ops import OPS, signature_of
from ...kernels.signature import Signature
from .collectives import FUSED
from .fields import AXES
from .layout import local_shape
from .plan import Plan
from .records import Buffer, Input, Op


@dataclass
class Program:
    """Records in the order of execution. Identical on all ranks: a rank enters only in data offsets.

    ``inputs``: all that is filled before a step. ``states`` and ``outputs``: buffers by what they are called outside.
    ``blocks``: of the model.
    """

    plan: Plan
    buffers: dict[str, Buffer]
    ops: list[Op]
    outputs: dict[str, str]
    inputs: tuple[Input, ...] = ()
    states: dict[str, str] = field(default_factory=dict)
    blocks: int = 0

    def __post_init__(self) -> None:
        self.sizes = {axis: self.plan.size(axis) for axis in AXES}
        self._local: dict[str, tuple[int, ...]] = {}
        self._split: dict[object, tuple[int, ...]] = {}  # local shapes by global shape and axes: few are distinct
        self._elements: dict[str, int] = {}
        self._bytes: dict[str, int] = {}
        self._counted: dict[object, tuple[int, int, int]] = {}  # by the op table, of records that are ``alike``
        self._root: dict[str, tuple[str, int]] = {}
        self._spans: dict[str, tuple[str, int, int]] = {}
        # Of a record, by its identity; it stands beside: in a copy of a program, another one may have the same.
        self._keys: dict[object, tuple[object, ...]] = {}  # one of those that are equal
        self._alike: dict[int, tuple[Op, tuple[object, ...]]] = {}
        self._storages: dict[int, tuple[Op, tuple[str, ...]]] = {}

    def local_shape(self, name: str) -> tuple[int, ...]:
        found = self._local.get(name)
        if found is None:
            buffer = self.buffers[name]
            key = (buffer.shape, buffer.placement.dims)
            found = self._split.get(key)
            if found is None:
                found = self._split[key] = local_shape(buffer.shape, buffer.placement, self.sizes)
            self._local[name] = found
        return found

    def local_strides(self, name: str) -> tuple[int, ...]:
        """In elements; C order unless the buffer is a strided view."""
        return self.buffers[name].strides or contiguous_strides(self.local_shape(name))

    def span(self, name: str) -> tuple[str, int, int]:
        """The storage, and the elements of it from the buffer's first to behind its last."""
        found = self._spans.get(name)
        if found is None:
            root, offset = self.root(name)
            strides = self.buffers[name].strides
            if strides is None:
                extent = self.local_elements(name)
            else:
                extent = 1 + sum((n - 1) * s for n, s in zip(self.local_shape(name), strides, strict=True))
            found = self._spans[name] = root, offset, offset + extent
        return found

    def local_elements(self, name: str) -> int:
        found = self._elements.get(name)
        if found is None:
            found = self._elements[name] = math.prod(self.local_shape(name))
        return found

    def bytes(self, name: str) -> int:
        """Local bytes of a buffer."""
        found = self._bytes.get(name)
        if found is None:
            found = self._bytes[name] = self.local_elements(name) * DTYPE_BYTES[self.buffers[name].dtype]
        return found

    def root(self, name: str) -> tuple[str, int]:
        """The buffer that owns the storage, and the offset in it, in local elements."""
        found = self._root.get(name)
        if found is None:
            buffer = self.buffers[name]
            if buffer.base is None:
                found = (name, 0)
            else:
                root, offset = self.root(buffer.base)
                found = (root, offset + buffer.offset)
            self._root[name] = found
        return found

    def storages(self, op: Op) -> tuple[str, ...]:
        """What a record touches, each once."""
        found = self._storages.get(id(op))
        if found is None or found[0] is not op:
            root = self.root
            found = op, tuple(dict.fromkeys([root(name)[0] for name in (*op.inputs, *op.outputs)]))
            self._storages[id(op)] = found
        return found[1]

    def label_signature(self, op: Op) -> Signature:
        return signature_of(op.kind, op.attrs)

    def label_sizes(self, op: Op) -> dict[str, int]:
        """Local size of every label of a compute op."""
        signature = signature_of(op.kind, op.attrs)
        shapes = [self.local_shape(name) for name in op.inputs[: len(signature.inputs)]]
        shapes += [self.local_shape(name) for name in op.outputs[: len(signature.outputs)]]
        return {label: shapes[i][dim] for label, i, dim in signature.places}

    def operands(self, op: Op) -> Operands:
        """Local shapes and dtypes of a compute op."""
        inputs, outputs = (
            [Operand(self.local_shape(name), self.buffers[name].dtype) for name in names]
            for names in (op.inputs, op.outputs)
        )
        attrs = {name: op.attrs[name] for name in OPS[op.kind].counted}
        return Operands.of(signature_of(op.kind, op.attrs), inputs, outputs, attrs)

    def alike(self, op: Op) -> tuple[object, ...]:
        """All that counts and prices of a compute op follow from: few records of a program differ in it."""
        found = self._alike.get(id(op))
        if found is None or found[0] is not op:
            shape, buffers = self.local_shape, self.buffers
            shown = [(shape(name), buffers[name].dtype) for name in (*op.inputs, *op.outputs)]
            counted = [op.attrs[name] for name in OPS[op.kind].counted]
            key = (op.kind, op.attrs.get("signature"), len(op.inputs), *shown, *counted)
            found = self._alike[id(op)] = op, self._keys.setdefault(key, key)
        return found[1]

    def counts(self, op: Op) -> tuple[int, int, int]:
        """FLOPs, bytes moved at least and workspace of a record on one rank, by the op table.

        Collectives and waits have none, a fused record those of its parts.
        """
        if op.kind in FUSED:
            flops, moved, workspaces = zip(*map(self.counts, op.parts), strict=True)
            return sum(flops), sum(moved), max(workspaces)
        if op.kind not in OPS:
            return 0, 0, 0
        key = self.alike(op)
        found = self._counted.get(key)
        if found is None:
            o, spec = self.operands(op), OPS[op.kind]
            found = self._counted[key] = spec.flops_of(o), spec.bytes_of(o), spec.workspace(o)
        return found

    def flops(self, op: Op) -> int:
        return self.counts(op)[0]

    def bytes_moved(self, op: Op) -> int:
        return self.counts(op)[1]

    def workspace_bytes(self, op: Op) -> int:
        return self.counts(op)[2]

    def payload_bytes(self, op: Op) -> int:
        """Full gathered size of a collective: the larger side; of a copy between spaces, what it copies."""
        op = op.collective
        return max(self.bytes(op.inputs[0]), self.bytes(op.outputs[0]))

    def wire_bytes(self, op: Op) -> float:
        """What one rank sends to others: payload * (n - 1) / n, twice that for an all-reduce."""
        op, ranks = op.collective, math.prod([self.sizes[axis] for axis in op.axes])
        return self.payload_bytes(op) * (ranks - 1) / ranks * (2 if op.kind == "all_reduce" else 1)

    def with_ops(self, ops: list[Op], extra: dict[str, Buffer] | None = None) -> Program:
        """The same buffers, and ``extra``, under other records; what is known of the buffers is handed on."""
        made = replace(self, buffers={**self.buffers, **(extra or {})}, ops=ops)
        made._split, made._counted, made._keys = self._split, self._counted, self._keys
        made._local, made._elements, made._bytes = dict(self._local), dict(self._elements), dict(self._bytes)
        for name in extra or ():
            for known in (made._local, made._elements, made._bytes):
                known.pop(name, None)
        if not any(name in self.buffers for name in extra or ()):
            made._root, made._spans = dict(self._root), dict(self._spans)
            made._alike, made._storages = self._alike, self._storages
        return made

    def reordered(self, before: Mapping[int, Sequence[int]]) -> Program:
        """The same with records moved: ``before`` says of a position which others now stand in front of it."""
        moved = {i for positions in before.values() for i in positions}
        ops: list[Op] = []
        for i in range(len(self.ops) + 1):
            ops += [self.ops[k] for k in before.get(i, ())]
            if i < len(self.ops) and i not in moved:
                ops.append(self.ops[i])
        return self.with_ops(ops)

    def under(self, plan: Plan) -> Program:
        """The same under another plan; where that splits the buffers alike, what is known of them is handed on."""
        made = replace(self, plan=plan)
        if made.sizes == self.sizes:
            vars(made).update(vars(self), plan=plan)
        return made

    def resized(self, plan: Plan, buffers: dict[str, Buffer], ops: list[Op]) -> Program:
        """Records that touch the same storages, whatever these measure."""
        made = replace(self, plan=plan, buffers=buffers, ops=ops)
        made._storages = self._storages
        return made


@lru_cache(maxsize=65536)
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements between neighbours along each dim, in C order."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
