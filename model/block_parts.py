"""Parts of a block and of the final layer, as program records: modulated norms, and products (torch-free)."""

from __future__ import annotations

import math
from typing import Any

from ..parallel.ir.builder import Builder
from ..parallel.ir.layout import TOKENS, Placement
from ..parallel.ir.records import Buffer
from ..parallel.layers import tensor
from ..parallel.layers.factors import Factors
from .config import ModelConfig
from .lora import factors_of

Weights = dict[str, Buffer]
DRows = tuple[Buffer | None, ...]  # places of gradients; None: of what is frozen


def local_row(b: Builder, buffer: Buffer) -> int:
    """Local elements of the dims behind the first: what one row of a view takes."""
    dims = zip(buffer.shape[1:], buffer.placement.dims[1:], strict=True)
    return math.prod(size // b.plan.size(axes) for size, axes in dims)


def rows(b: Builder, stacked: Buffer, names: tuple[str, ...]) -> tuple[Buffer, ...]:
    """Views of the rows of [R, B, D]."""
    placement = Placement(stacked.placement.dims[1:], stacked.placement.partial)
    step = local_row(b, stacked)
    return tuple(b.view(stacked, name, stacked.shape[1:], placement, i * step) for i, name in enumerate(names))


def modulation_gradient(b: Builder, modulation: Buffer, names: tuple[str, ...]) -> tuple[Buffer | None, DRows]:
    """A place for the gradient of a modulation [R, B, D], and its rows; none where nothing of it is trained."""
    if not b.needs_gradient(modulation):
        return None, (None,) * len(names)
    placement = Placement(modulation.placement.dims, frozenset(TOKENS))
    gradient = b.buffer("dmodulation", modulation.shape, b.plan.stat_dtype, placement)
    return gradient, rows(b, gradient, names)


class ModulatedNorm:
    """A norm with a scale and a shift of every sample: an RMS norm with a ``gain``, or without one DiT's layer norm.

    ``by_token``: slice by slice, where tokens are sliced.
    """

    def __init__(self, b: Builder, eps: float, gain: Buffer | None, *, by_token: bool = True) -> None:
        self.b, self.eps, self.gain = b, eps, gain
        self._op = tensor.token_local if by_token else Builder.op

    def forward(self, x: Buffer, scale: Buffer, shift: Buffer, h: str, statistic: str) -> Buffer:
        """x [T, B, D] split by (cp, tp), scale and shift [B, D] -> the same placed, called ``h``."""
        b, stat = self.b, self.b.plan.stat_dtype
        self.x, self.scale = x, scale
        if self.gain is not None:
            kind, vectors, names = "modulate_norm", [self.gain, scale, shift], [h, statistic]
        else:
            kind, vectors, names = "modulate_layer_norm", [scale, shift], [h, f"{statistic}_mean", statistic]
        dtypes = [x.dtype, *[stat] * (len(names) - 1)]
        self.h, *self.statistics = self._op(b, kind, [x, *vectors], names, dtypes=dtypes, eps=self.eps)
        return self.h

    def backward(
        self,
        dh: Buffer,
        dskip: Buffer | None,
        name: str,
        dgain: Buffer | None,
        dscale: Buffer | None,
        dshift: Buffer | None,
    ) -> Buffer:
        """The gradient of x, added to that of a stream beside it; the others go where they are given."""
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


class BlockProduct:
    """A product of a block, with what may belong to it: low-rank factors beside its weight, a bias behind it.

    ``name``: of its weight in the block's ``unit``; ``called``: what is made. It remembers what backward reads.
    """

    by_token = False  # whether the bias is added slice by slice, where tokens are sliced

    def __init__(
        self, b: Builder, c: ModelConfig, w: Weights, unit: str, name: str, signature: str, called: str = ""
    ) -> None:
        self.b, self.signature, self.key, self.name = b, signature, f"{unit}.{name}", name.replace(".", "_")
        self.called = called or self.name
        self.weight, self.bias = w[self.key], w.get(f"{self.key}_bias")
        self.factors: Factors | None = None
        if c.lora is not None and name in c.lora.targets:
            self.factor_keys = [f"{unit}.{factor}" for factor in factors_of(name)]
            down, up = (w[key] for key in self.factor_keys)
            self.factors = Factors(b, down, up, c.lora.scale, signature, name)

    @property
    def product_name(self) -> str:
        """Of the product alone: where a bias follows, the sum has the name."""
        return self.called if self.bias is None else f"{self.called}_product"

    @property
    def in_column(self) -> tensor.Product:
        """As ``tensor.column`` takes it."""
        return self.weight, self.signature, self.product_name

    def forward(self, x: Buffer) -> Buffer:
        """The product of x, whole."""
        return self.finish(x, tensor.linear(self.b, x, *self.in_column))

    def finish(self, x: Buffer, product: Buffer) -> Buffer:
        """The product of x that somebody made, with what its factors make of x and its bias."""
        self.x, self.product = x, product
        return self._biased(product if self.factors is None else self.factors.forward(x, product))

    def _biased(self, product: Buffer) -> Buffer:
        """Labels of the sum: ``tbi,ihk->tbhk`` makes ``tbhk,hk->tbhk``."""
        self.out = product
        if self.bias is not None:
            left, made = self.signature.split("->")
            inputs, weight = left.split(",")
            self.of_bias = "".join(label for label in weight if label not in inputs)
            operands, labels = [product, self.bias], f"{made},{self.of_bias}->{made}"
            add = tensor.token_local if self.by_token else Builder.op
            (self.out,) = add(self.b, "add_table", operands, [self.called], signature=labels)
        return self.out

    def product_backward(self, dw: Weights, dout: Buffer) -> Buffer:
        """The gradient of the product, of that of what it became with its bias, whose own goes to ``dw``."""
        if self.bias is None:
            return dout
        b, of = self.b, self.b.producers(self.out)
        if (dbias := dw.get(f"{self.key}_bias")) is not None:
            facts: dict[str, Any] = {"into": {0: dbias}, "dtypes": dbias.dtype, "gradient": dout, "wrt": {0: 1}}
            labels = f"{self.signature.split('->')[1]}->{self.of_bias}"
            b.op("sum_to", [dout], f"d{self.name}_bias", signature=labels, of=of, **facts)
        return b.pass_through(dout, of, {f"d{self.called}_product": 0})[0]

    def factors_backward(self, dw: Weights, dy: Buffer, dx: Buffer | None = None) -> Buffer | None:
        """Gradients of the factors; returns that of x, added to ``dx``."""
        if self.factors is None:
            return dx
        ddown, dup = (dw[key] for key in self.factor_keys)
        return self.factors.backward(dy, self.x, ddown, dup, dx)

    def weight_backward(self, dw: Weights, dy: Buffer, column: tensor.Column | None = None) -> None:
        """``column``: whose first product this is."""
        product = column.first if column else self.product
        tensor.linear_weight_backward(self.b, dy, product, self.x, dw.get(self.key))

    def input_backward(self, dy: Buffer, name: str, add_to: Buffer | None, dtype: str | None = None) -> Buffer:
        return tensor.linear_input_backward(self.b, dy, self.product, self.weight, name, add_to=add_to, dtype=dtype)


class RowProduct(BlockProduct):
    """One that is split over its inputs: what tp sums, and the stream takes in."""

    by_token = True

    def forward(self, x: Buffer) -> Buffer:
        """What is added to the stream, split by (cp, tp)."""
        self.x = x
        below = None if self.factors is None else self.factors.forward(x)
        partial = f"{self.called}_partial"
        self.row = tensor.row(self.b, x, self.weight, self.signature, partial, self.product_name, below)
        return self._biased(self.row.out)

    def backward(self, dw: Weights, dout: Buffer, name: str) -> Buffer:
        """The gradient of x, called ``name``; those of weights go to ``dw``."""
        gathered = f"{dout.role}_gathered"
        dout = self.product_backward(dw, dout)
        dz, dx = tensor.row_backward(self.b, dout, self.row, self.x, self.weight, dw.get(self.key), gathered, name)
        return self.factors_backward(dw, dz, dx) or dx
