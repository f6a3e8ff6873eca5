"""The transformer block as program records, forward and backward by hand (torch-free).

The mathematics is that of ``reference.py``; the split is that of Movie Gen A.2:

    patchifier, position tables, time MLP, final layer   FSDP only; tokens split over cp (outer) and tp (inner)
    text projections, shared adaLN                        FSDP + tp; their outputs are summed or gathered over tp
    norms, modulation, gates, residuals                   token-local, split over cp and tp
    self-attention                                        tp over heads, tokens over cp, K and V gathered over cp
    cross-attention                                       tp over heads, queries over cp, text K and V on every cp rank
    FFN                                                   tp over its width, tokens over cp

Gradients that all layers share (modulation, text, positions) are summed locally over the layers in the statistics
dtype, reduced over tp once a step, and stay Partial over cp and dp until their unit's reduce-scatter.

Products may have low-rank factors (``layers/factors.py``). What all layers share then depends on nothing that is
trained, and has no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..parallel.ir.builder import Builder
from ..parallel.ir.layout import TOKENS, Placement
from ..parallel.ir.records import Buffer
from ..parallel.layers import context, tensor
from ..parallel.layers.factors import Factors
from .config import MODULATION_ROWS, ModelConfig
from .lora import factors_of

Weights = dict[str, Buffer]
DRows = tuple[Buffer | None, ...]  # places of gradients; None: of what is frozen

SHIFT1, SCALE1, GATE1, SHIFT2, SCALE2, GATE2 = range(MODULATION_ROWS)


@dataclass
class Conditioning:
    """What every block reads: positions [T, D], modulation [D, 6, B], text [L, B, D], key mask [B, L]; time [B, D]."""

    position: Buffer
    modulation: Buffer
    text: Buffer
    mask: Buffer
    time: Buffer


@dataclass
class SharedGradients:
    """Sums over the layers of the gradients of :class:`Conditioning`; None before the first contribution."""

    position: Buffer | None = None
    modulation: Buffer | None = None
    text: Buffer | None = None
    time: Buffer | None = None


def local_row(b: Builder, buffer: Buffer) -> int:
    """Local elements of the dims behind the first: what one row of a view takes."""
    dims = zip(buffer.shape[1:], buffer.placement.dims[1:], strict=True)
    return math.prod(size // b.plan.size(axes) for size, axes in dims)


def rows(b: Builder, stacked: Buffer, names: tuple[str, ...]) -> tuple[Buffer, ...]:
    """Views of the rows of [R, B, D]."""
    placement = Placement(stacked.placement.dims[1:], stacked.placement.partial)
    step = local_row(b, stacked)
    return tuple(b.view(stacked, name, stacked.shape[1:], placement, i * step) for i, name in enumerate(names))


class Block:
    """One transformer block. ``forward`` remembers the buffers that ``backward`` differentiates."""

    def __init__(self, b: Builder, c: ModelConfig, unit: str) -> None:
        self.b, self.c, self.unit = b, c, unit
        self.factors: dict[str, Factors] = {}  # of adapted products

    def _weight(self, w: Weights, name: str) -> Buffer:
        return w[f"{self.unit}.{name}"]

    def _gradient(self, dw: Weights, name: str) -> Buffer | None:
        """Where a weight's gradient goes; None: it is frozen."""
        return dw.get(f"{self.unit}.{name}")

    def _adapt(self, w: Weights, name: str, x: Buffer, signature: str, product: Buffer | None) -> Buffer | None:
        """What the factors of a weight make of x, added to its ``product``; where it has none, the product itself."""
        lora = self.c.lora
        if lora is None or name not in lora.targets:
            return product
        down, up = (self._weight(w, factor) for factor in factors_of(name))
        self.factors[name] = Factors(self.b, down, up, lora.scale, signature, name)
        return self.factors[name].forward(x, product)

    def _adapted(self, w: Weights, name: str, x: Buffer, signature: str, product: Buffer) -> Buffer:
        made = self._adapt(w, name, x, signature, product)
        assert made is not None
        return made

    def _adapt_backward(self, dw: Weights, name: str, dy: Buffer, x: Buffer, dx: Buffer | None = None) -> Buffer | None:
        """Gradients of a weight's factors; returns that of x, added to ``dx``."""
        if name not in self.factors:
            return dx
        ddown, dup = (self._weight(dw, factor) for factor in factors_of(name))
        return self.factors[name].backward(dy, x, ddown, dup, dx)

    def forward(self, w: Weights, x: Buffer, cond: Conditioning) -> Buffer:
        """x [T, B, D] split by (cp, tp), by ``w`` of this block's unit and what all blocks share -> the same placed."""
        b, stat = self.b, self.b.plan.stat_dtype
        eps = self.c.norm_eps
        (self.x0,) = tensor.token_local(b, "add_position", [x, cond.position], ["x0"], (0, 1))
        (self.modulation,) = b.op(
            "add_table",
            [cond.modulation, self._weight(w, "table")],
            "modulation",
            signature="drb,rd->rbd",
        )
        self.rows = rows(b, self.modulation, ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2"))
        r = self.rows

        vectors = [self._weight(w, "norm1"), r[SCALE1], r[SHIFT1]]
        self.h1, self.rstd1 = tensor.token_local(
            b, "modulate_norm", [self.x0, *vectors], ["h1", "rstd1"], dtypes=(x.dtype, stat), eps=eps
        )
        # K and V first: they are on their way over cp while q is computed.
        of_kv, of_q, of_o = "tbi,ichk->tbchk", "tbi,ihk->tbhk", "tbhk,hko->tbo"
        self.qkv = tensor.column(b, self.h1, "h1_gathered", [(self._weight(w, "kv"), of_kv, "kv")])
        self.kv = self._adapted(w, "kv", self.qkv.gathered, of_kv, self.qkv.outputs[0])
        self.attention = context.split(b, self.kv)
        self.q_product = tensor.linear(b, self.qkv.gathered, self._weight(w, "q"), of_q, "q")
        self.q = self._adapted(w, "q", self.qkv.gathered, of_q, self.q_product)
        self.o = self.attention.forward(self.q)
        below = self._adapt(w, "o", self.o, of_o, None)
        self.y1 = tensor.row(b, self.o, self._weight(w, "o"), of_o, "y1_partial", "y1", below)
        (self.x1,) = tensor.token_local(b, "gated_residual", [self.x0, self.y1.out, r[GATE1]], ["x1"], (0, 1))

        # Needs nothing of this block: it runs while the tokens are on their way.
        of_text = "lbi,ichk->lbchk"
        self.ckv_product = tensor.linear(b, cond.text, self._weight(w, "cross.kv"), of_text, "cross_kv")
        self.ckv = self._adapted(w, "cross.kv", cond.text, of_text, self.ckv_product)
        self.cross = tensor.column(b, self.x1, "x1_gathered", [(self._weight(w, "cross.q"), of_q, "cross_q")])
        self.cq = self._adapted(w, "cross.q", self.cross.gathered, of_q, self.cross.outputs[0])
        self.co, self.clse = b.op(
            "cross_attention",
            [self.cq, self.ckv, cond.mask],
            ("cross_o", "cross_lse"),
            dtypes=(x.dtype, stat),
        )
        below = self._adapt(w, "cross.o", self.co, of_o, None)
        self.y2 = tensor.row(b, self.co, self._weight(w, "cross.o"), of_o, "y2_partial", "y2", below)
        (self.x2,) = tensor.token_local(b, "residual", [self.x1, self.y2.out], ["x2"], (0, 1))

        vectors = [self._weight(w, "norm2"), r[SCALE2], r[SHIFT2]]
        self.h2, self.rstd2 = tensor.token_local(
            b, "modulate_norm", [self.x2, *vectors], ["h2", "rstd2"], dtypes=(x.dtype, stat), eps=eps
        )
        of_ffn, of_down = "tbi,if->tbf", "tbf,fo->tbo"
        products = [(self._weight(w, name), of_ffn, name) for name in ("gate", "up")]
        self.gate_up = tensor.column(b, self.h2, "h2_gathered", products)
        gate, self.up_product = self.gate_up.outputs
        self.gate = self._adapted(w, "gate", self.gate_up.gathered, of_ffn, gate)
        self.up = self._adapted(w, "up", self.gate_up.gathered, of_ffn, self.up_product)
        (self.act,) = b.op("swiglu", [self.gate, self.up], "act")
        below = self._adapt(w, "down", self.act, of_down, None)
        self.y3 = tensor.row(b, self.act, self._weight(w, "down"), of_down, "y3_partial", "y3", below)
        (self.out,) = tensor.token_local(b, "gated_residual", [self.x2, self.y3.out, r[GATE2]], ["x"], (0, 1))
        return self.out

    def backward(self, w: Weights, dw: Weights, dout: Buffer, cond: Conditioning, shared: SharedGradients) -> Buffer:
        """Gradient of the block's input; weight gradients go to ``dw``, shared ones are added to ``shared``."""
        b, stat = self.b, self.b.plan.stat_dtype
        dmodulation: Buffer | None = None
        drows: DRows = (None,) * MODULATION_ROWS
        if b.needs_gradient(self.modulation):
            row_placement = Placement(self.modulation.placement.dims, frozenset(TOKENS))
            dmodulation = b.buffer("dmodulation", self.modulation.shape, stat, row_placement)
            drows = rows(b, dmodulation, ("dshift1", "dscale1", "dgate1", "dshift2", "dscale2", "dgate2"))

        dx2 = self._ffn_backward(w, dw, dout, drows)
        dx1 = self._cross_attention_backward(w, dw, dx2, cond, shared)
        dx0 = self._self_attention_backward(w, dw, dx1, drows)

        add_position = b.producers(self.x0)
        if b.needs_gradient(cond.position):
            (shared.position,) = b.op(
                "sum_to",
                [dx0],
                "dposition",
                signature="tbd->td",
                dtypes=stat,
                add_to=shared.position,
                of=add_position,
                gradient=dx0,
                wrt={0: 1},
            )
        (dx,) = b.pass_through(dx0, add_position, {"dx": 0})
        if dmodulation is not None:
            self._modulation_backward(dw, dmodulation, shared)
        return dx

    def _modulation_backward(self, dw: Weights, dmodulation: Buffer, shared: SharedGradients) -> None:
        """Of this block's table, and of what all blocks share."""
        b, add_table = self.b, self.b.producers(self.modulation)
        b.op(
            "sum_to",
            [dmodulation],
            "dtable",
            signature="rbd->rd",
            dtypes=b.plan.stat_dtype,
            into={0: self._weight(dw, "table")},
            of=add_table,
            gradient=dmodulation,
            wrt={0: 1},
        )
        if shared.modulation is None:
            (shared.modulation,) = b.pass_through(dmodulation, add_table, {"dmodulation_sum": 0})
        else:
            (shared.modulation,) = b.op(
                "accumulate",
                [dmodulation],
                "dmodulation_sum",
                signature="rbd->rbd",
                add_to=shared.modulation,
                of=add_table,
                gradient=dmodulation,
                wrt={0: 0},
            )

    def _gate_backward(
        self, dout: Buffer, out: Buffer, y: Buffer, gate: Buffer, dgate: Buffer | None, dy: str, dx: str
    ) -> tuple[Buffer, Buffer]:
        """Gradients of the branch and of the residual stream of ``out = x + gate * y``."""
        b = self.b
        of = b.producers(out)
        dbranch, _ = b.op(
            "gated_residual_backward",
            [dout, y, gate],
            (dy, f"d{gate.role}_sum"),
            dtypes=(dout.dtype, b.plan.stat_dtype),
            into={1: dgate} if dgate else None,
            of=of,
            gradient=dout,
            wrt={0: 1, 1: 2},
        )
        (dskip,) = b.pass_through(dout, of, {dx: 0})
        return dbranch, dskip

    def _norm_backward(
        self, dh: Buffer, h: Buffer, given: tuple[Buffer, ...], into: DRows, dskip: Buffer, name: str
    ) -> Buffer:
        """``given``: x, rstd, gain, scale of the forward norm; ``into``: the gradients of gain, scale and shift."""
        b, stat = self.b, self.b.plan.stat_dtype
        dx, _, _, _ = b.op(
            "modulate_norm_backward",
            [dh, *given],
            (name, f"{name}_gain", f"{name}_scale", f"{name}_shift"),
            dtypes=(dh.dtype, stat, stat, stat),
            into={i: place for i, place in enumerate(into, 1) if place},
            add_to=dskip,
            of=b.producers(h),
            gradient=dh,
            wrt={0: 0, 1: 1, 2: 2, 3: 3},
        )
        return dx

    def _row_backward(
        self, w: Weights, dw: Weights, name: str, dout: Buffer, layer: tensor.Row, y: Buffer, gathered: str, dy: str
    ) -> Buffer:
        """The gradient of a row's input ``y``; those of its weight and factors go to ``dw``."""
        weight, dweight = self._weight(w, name), self._gradient(dw, name)
        dz, made = tensor.row_backward(self.b, dout, layer, y, weight, dweight, gathered, dy)
        return self._adapt_backward(dw, name, dz, y, made) or made

    def _ffn_backward(self, w: Weights, dw: Weights, dout: Buffer, drows: DRows) -> Buffer:
        b, r, x = self.b, self.rows, self.gate_up.gathered
        dy3, dskip = self._gate_backward(dout, self.out, self.y3.out, r[GATE2], drows[GATE2], "dy3", "dx2_skip")
        dact = self._row_backward(w, dw, "down", dy3, self.y3, self.act, "dy3_gathered", "dact")
        dgate, dup = b.op(
            "swiglu_backward",
            [dact, self.gate, self.up],
            ("dgate", "dup"),
            of=b.producer(self.act),
            gradient=dact,
            wrt={0: 0, 1: 1},
        )
        others = self._adapt_backward(dw, "up", dup, x)
        others = self._adapt_backward(dw, "gate", dgate, x, others)
        weight = self._weight(w, "up")
        of_up = tensor.linear_input_backward(b, dup, self.up_product, weight, "dh2_of_up", add_to=others)
        dh2g = tensor.column_input_backward(
            b, self.gate_up, dgate, self._weight(w, "gate"), "dh2_gathered", others=of_up
        )
        tensor.linear_weight_backward(b, dup, self.up_product, x, self._gradient(dw, "up"))
        tensor.linear_weight_backward(b, dgate, self.gate_up.first, x, self._gradient(dw, "gate"))
        dh2 = tensor.gather_tokens_backward(b, dh2g, self.gate_up, "dh2")
        return self._norm_backward(
            dh2,
            self.h2,
            (self.x2, self.rstd2, self._weight(w, "norm2"), r[SCALE2]),
            (self._gradient(dw, "norm2"), drows[SCALE2], drows[SHIFT2]),
            dskip,
            "dx2",
        )

    def _cross_attention_backward(
        self, w: Weights, dw: Weights, dx2: Buffer, cond: Conditioning, shared: SharedGradients
    ) -> Buffer:
        b = self.b
        dskip, dy2 = b.pass_through(dx2, b.producers(self.x2), {"dx1_skip": 0, "dy2": 1})
        dco = self._row_backward(w, dw, "cross.o", dy2, self.y2, self.co, "dy2_gathered", "dcross_o")
        dcq, dckv = b.op(
            "cross_attention_backward",
            [dco, self.cq, self.ckv, self.co, self.clse, cond.mask],
            ("dcross_q", "dcross_kv"),
            of=b.producer(self.co),
            gradient=dco,
            wrt={0: 0, 1: 1},
        )
        tensor.linear_weight_backward(b, dckv, self.ckv_product, cond.text, self._gradient(dw, "cross.kv"))
        shared.text = self._adapt_backward(dw, "cross.kv", dckv, cond.text, shared.text)
        if b.needs_gradient(cond.text):
            shared.text = tensor.linear_input_backward(
                b,
                dckv,
                self.ckv_product,
                self._weight(w, "cross.kv"),
                "dcontext",
                add_to=shared.text,
                dtype=b.plan.stat_dtype,
            )
        weight, x = self._weight(w, "cross.q"), self.cross.gathered
        others = self._adapt_backward(dw, "cross.q", dcq, x)
        dx1g = tensor.column_input_backward(b, self.cross, dcq, weight, "dx1_gathered", others=others)
        tensor.linear_weight_backward(b, dcq, self.cross.first, x, self._gradient(dw, "cross.q"))
        dx1 = tensor.gather_tokens_backward(b, dx1g, self.cross, "dx1_of_cross")
        return b.op("add", [dx1], "dx1", add_to=dskip)[0]

    def _self_attention_backward(self, w: Weights, dw: Weights, dx1: Buffer, drows: DRows) -> Buffer:
        b, r, x = self.b, self.rows, self.qkv.gathered
        dy1, dskip = self._gate_backward(dx1, self.x1, self.y1.out, r[GATE1], drows[GATE1], "dy1", "dx0_skip")
        do = self._row_backward(w, dw, "o", dy1, self.y1, self.o, "dy1_gathered", "do")
        dq = self.attention.backward(do)
        others = self._adapt_backward(dw, "q", dq, x)
        weight = self._weight(w, "q")
        of_q = tensor.linear_input_backward(b, dq, self.q_product, weight, "dh1_of_q", add_to=others)
        tensor.linear_weight_backward(b, dq, self.q_product, x, self._gradient(dw, "q"))
        dkv = self.attention.join()
        others = self._adapt_backward(dw, "kv", dkv, x, of_q)
        dh1g = tensor.column_input_backward(b, self.qkv, dkv, self._weight(w, "kv"), "dh1_gathered", others=others)
        tensor.linear_weight_backward(b, dkv, self.qkv.first, x, self._gradient(dw, "kv"))
        dh1 = tensor.gather_tokens_backward(b, dh1g, self.qkv, "dh1")
        return self._norm_backward(
            dh1,
            self.h1,
            (self.x0, self.rstd1, self._weight(w, "norm1"), r[SCALE1]),
            (self._gradient(dw, "norm1"), drows[SCALE1], drows[SHIFT1]),
            dskip,
            "dx0",
        )
