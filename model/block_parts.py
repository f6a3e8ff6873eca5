"""What a block's style decides, as program records: its norms and the biases of its products (torch-free)."""

from __future__ import annotations

from typing import Any

from ..parallel.ir.builder import Builder
from ..parallel.ir.records import Buffer
from ..parallel.layers import tensor
from .config import ModelConfig


class ModulatedNorm:
    """A norm with a scale and a shift of every sample: an RMS norm with a ``gain``, or without one DiT's layer norm."""

    def __init__(self, b: Builder, c: ModelConfig, gain: Buffer | None) -> None:
        self.b, self.eps, self.gain = b, c.block_eps, gain

    def forward(self, x: Buffer, scale: Buffer, shift: Buffer, h: str, statistic: str) -> Buffer:
        """x [T, B, D] split by (cp, tp), scale and shift [B, D] -> the same placed, called ``h``."""
        b, stat = self.b, self.b.plan.stat_dtype
        self.x, self.scale = x, scale
        if self.gain is not None:
            kind, vectors, names = "modulate_norm", [self.gain, scale, shift], [h, statistic]
        else:
            kind, vectors, names = "modulate_layer_norm", [scale, shift], [h, f"{statistic}_mean", statistic]
        dtypes = [x.dtype, *[stat] * (len(names) - 1)]
        self.h, *self.statistics = tensor.token_local(b, kind, [x, *vectors], names, dtypes=dtypes, eps=self.eps)
        return self.h

    def backward(
        self,
        dh: Buffer,
        dskip: Buffer,
        name: str,
        dgain: Buffer | None,
        dscale: Buffer | None,
        dshift: Buffer | None,
    ) -> Buffer:
        """The gradient of x, added to that of the stream beside it; the others go where they are given."""
        b, stat = self.b, self.b.plan.stat_dtype
        if self.gain is not None:
            kind, given = "modulate_norm_backward", [self.x, *self.statistics, self.gain, self.scale]
            made, places = ("gain", "scale", "shift"), (dgain, dscale, dshift)
        else:
            kind, given = "modulate_layer_norm_backward", [self.x, *self.statistics, self.scale]
            made, places = ("scale", "shift"), (dscale, dshift)
        dx, *_ = b.op(
            kind,
            [dh, *given],
            (name, *(f"{name}_{what}" for what in made)),
            dtypes=(dh.dtype, *[stat] * len(made)),
            into={i: place for i, place in enumerate(places, 1) if place},
            add_to=dskip,
            of=b.producers(self.h),
            gradient=dh,
            wrt={i: i for i in range(len(made) + 1)},
        )
        return dx


def add_bias(b: Builder, product: Buffer, bias: Buffer, signature: str, name: str, *, by_token: bool = False) -> Buffer:
    """The sum, called ``name``; labels as ``tbf,f->tbf``. ``by_token``: slice by slice, where tokens are sliced."""
    if by_token:
        return tensor.token_local(b, "add_table", [product, bias], [name], signature=signature)[0]
    return b.op("add_table", [product, bias], name, signature=signature)[0]


def add_bias_backward(
    b: Builder, dy: Buffer, out: Buffer, dbias: Buffer | None, signature: str, name: str, dproduct: str
) -> Buffer:
    """The gradient of the product, called ``dproduct``: that of the sum. The bias's goes to its place."""
    of = b.producers(out)
    if dbias is not None:
        left, labels = signature.split("->")
        reduced = f"{labels}->{left.split(',')[1]}"
        into: dict[str, Any] = {"into": {0: dbias}, "dtypes": dbias.dtype}
        b.op("sum_to", [dy], f"d{name}_bias", signature=reduced, of=of, gradient=dy, wrt={0: 1}, **into)
    return b.pass_through(dy, of, {dproduct: 0})[0]
