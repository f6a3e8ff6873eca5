"""FLOPs that utilisation is made of: the model's (MFU) and those that ran (HFU), from a program (torch-free)."""

from __future__ import annotations

from collections.abc import Iterator

from ...kernels.counts import Operand, Operands
from ...kernels.ops import OPS, signature_of
from .program import Program
from .records import Op, Phase


def model_flops(program: Program) -> int:
    """Of a whole step on all ranks: the matrix products of forward, and twice as many for backward.

    Counted on global shapes, so what several ranks do alike counts once. Recompute does not count, nor do the scores
    that attention's backward makes again, nor element-wise work.
    """
    products = (op for record in program.ops for op in _products(record))
    forward = (op for op in products if op.place.phase is Phase.FORWARD and not op.clone)
    return 3 * sum(OPS[op.kind].flops_of(_whole(program, op)) for op in forward)


def hardware_flops(program: Program) -> int:
    """Of the matrix products that one rank runs: recompute, and work that several ranks do alike, counted."""
    return sum(record_flops(program, record) for record in program.ops)


def record_flops(program: Program, record: Op) -> int:
    """Of one record's matrix products, those within a fused one too."""
    return sum(program.flops(op) for op in _products(record))


def _products(record: Op) -> Iterator[Op]:
    yield from (op for op in record.parts if op.kind in OPS and OPS[op.kind].is_product)


def _whole(program: Program, op: Op) -> Operands:
    """A record's operands on all ranks together."""
    inputs, outputs = (
        [Operand(program.buffers[name].shape, program.buffers[name].dtype) for name in names]
        for names in (op.inputs, op.outputs)
    )
    return Operands.of(signature_of(op.kind, op.attrs), inputs, outputs, {})
