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
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..parallel.ir.builder import Builder
from ..parallel.ir.layout import TOKENS, Placement
from ..parallel.ir.records import Buffer
from ..parallel.layers import context, tensor
from .config import MODULATION_ROWS, ModelConfig

Weights = dict[str, Buffer]

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

    def _weight(self, w: Weights, name: str) -> Buffer:
        return w[f"{self.unit}.{name}"]

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
        self.qkv = tensor.column(b, self.h1, "h1_gathered", [(self._weight(w, "kv"), "tbi,ichk->tbchk", "kv")])
        (self.kv,) = self.qkv.outputs
        self.attention = context.split(b, self.kv)
        self.q = tensor.linear(b, self.qkv.gathered, self._weight(w, "q"), "tbi,ihk->tbhk", "q")
        self.o = self.attention.forward(self.q)
        self.y1 = tensor.row(b, self.o, self._weight(w, "o"), "tbhk,hko->tbo", "y1_partial", "y1")
        (self.x1,) = tensor.token_local(b, "gated_residual", [self.x0, self.y1.out, r[GATE1]], ["x1"], (0, 1))

        # Needs nothing of this block: it runs while the tokens are on their way.
        self.ckv = tensor.linear(b, cond.text, self._weight(w, "cross.kv"), "lbi,ichk->lbchk", "cross_kv")
        products = [(self._weight(w, "cross.q"), "tbi,ihk->tbhk", "cross_q")]
        self.cross = tensor.column(b, self.x1, "x1_gathered", products)
        (self.cq,) = self.cross.outputs
        self.co, self.clse = b.op(
            "cross_attention",
            [self.cq, self.ckv, cond.mask],
            ("cross_o", "cross_lse"),
            dtypes=(x.dtype, stat),
        )
        self.y2 = tensor.row(b, self.co, self._weight(w, "cross.o"), "tbhk,hko->tbo", "y2_partial", "y2")
        (self.x2,) = tensor.token_local(b, "residual", [self.x1, self.y2.out], ["x2"], (0, 1))

        vectors = [self._weight(w, "norm2"), r[SCALE2], r[SHIFT2]]
        self.h2, self.rstd2 = tensor.token_local(
            b, "modulate_norm", [self.x2, *vectors], ["h2", "rstd2"], dtypes=(x.dtype, stat), eps=eps
        )
        products = [
            (self._weight(w, "gate"), "tbi,if->tbf", "gate"),
            (self._weight(w, "up"), "tbi,if->tbf", "up"),
        ]
        self.gate_up = tensor.column(b, self.h2, "h2_gathered", products)
        self.gate, self.up = self.gate_up.outputs
        (self.act,) = b.op("swiglu", [self.gate, self.up], "act")
        self.y3 = tensor.row(b, self.act, self._weight(w, "down"), "tbf,fo->tbo", "y3_partial", "y3")
        (self.out,) = tensor.token_local(b, "gated_residual", [self.x2, self.y3.out, r[GATE2]], ["x"], (0, 1))
        return self.out

    def backward(self, w: Weights, dw: Weights, dout: Buffer, cond: Conditioning, shared: SharedGradients) -> Buffer:
        """Gradient of the block's input; weight gradients go to ``dw``, shared ones are added to ``shared``."""
        b, stat = self.b, self.b.plan.stat_dtype
        row_placement = Placement(self.modulation.placement.dims, frozenset(TOKENS))
        dmodulation = b.buffer("dmodulation", self.modulation.shape, stat, row_placement)
        drows = rows(b, dmodulation, ("dshift1", "dscale1", "dgate1", "dshift2", "dscale2", "dgate2"))

        dx2 = self._ffn_backward(w, dw, dout, drows)
        dx1 = self._cross_attention_backward(w, dw, dx2, cond, shared)
        dx0 = self._self_attention_backward(w, dw, dx1, drows)

        add_position = b.producers(self.x0)
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

        add_table = b.producers(self.modulation)
        b.op(
            "sum_to",
            [dmodulation],
            "dtable",
            signature="rbd->rd",
            dtypes=stat,
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
        return dx

    def _gate_backward(
        self, dout: Buffer, out: Buffer, y: Buffer, gate: Buffer, dgate: Buffer, dy: str, dx: str
    ) -> tuple[Buffer, Buffer]:
        """Gradients of the branch and of the residual stream of ``out = x + gate * y``."""
        b = self.b
        of = b.producers(out)
        dbranch, _ = b.op(
            "gated_residual_backward",
            [dout, y, gate],
            (dy, f"d{gate.role}_sum"),
            dtypes=(dout.dtype, dgate.dtype),
            into={1: dgate},
            of=of,
            gradient=dout,
            wrt={0: 1, 1: 2},
        )
        (dskip,) = b.pass_through(dout, of, {dx: 0})
        return dbranch, dskip

    def _norm_backward(
        self, dh: Buffer, h: Buffer, given: tuple[Buffer, ...], into: tuple[Buffer, ...], dskip: Buffer, name: str
    ) -> Buffer:
        """``given``: x, rstd, gain, scale of the forward norm; ``into``: the gradients of gain, scale and shift."""
        b, stat = self.b, self.b.plan.stat_dtype
        dx, _, _, _ = b.op(
            "modulate_norm_backward",
            [dh, *given],
            (name, f"{name}_gain", f"{name}_scale", f"{name}_shift"),
            dtypes=(dh.dtype, stat, stat, stat),
            into=dict(enumerate(into, 1)),
            add_to=dskip,
            of=b.producers(h),
            gradient=dh,
            wrt={0: 0, 1: 1, 2: 2, 3: 3},
        )
        return dx

    def _ffn_backward(self, w: Weights, dw: Weights, dout: Buffer, drows: tuple[Buffer, ...]) -> Buffer:
        b, r = self.b, self.rows
        dy3, dskip = self._gate_backward(dout, self.out, self.y3.out, r[GATE2], drows[GATE2], "dy3", "dx2_skip")
        weight, dweight = self._weight(w, "down"), self._weight(dw, "down")
        dact = tensor.row_backward(b, dy3, self.y3, self.act, weight, dweight, "dy3_gathered", "dact")
        dgate, dup = b.op(
            "swiglu_backward",
            [dact, self.gate, self.up],
            ("dgate", "dup"),
            of=b.producer(self.act),
            gradient=dact,
            wrt={0: 0, 1: 1},
        )
        of_up = tensor.linear_input_backward(b, dup, self.up, self._weight(w, "up"), "dh2_of_up")
        dh2g = tensor.column_input_backward(
            b, self.gate_up, dgate, self._weight(w, "gate"), "dh2_gathered", others=of_up
        )
        tensor.linear_weight_backward(b, dup, self.up, self.gate_up.gathered, self._weight(dw, "up"))
        tensor.linear_weight_backward(b, dgate, self.gate_up.first, self.gate_up.gathered, self._weight(dw, "gate"))
        dh2 = tensor.gather_tokens_backward(b, dh2g, self.gate_up, "dh2")
        return self._norm_backward(
            dh2,
            self.h2,
            (self.x2, self.rstd2, self._weight(w, "norm2"), r[SCALE2]),
            (self._weight(dw, "norm2"), drows[SCALE2], drows[SHIFT2]),
            dskip,
            "dx2",
        )

    def _cross_attention_backward(
        self, w: Weights, dw: Weights, dx2: Buffer, cond: Conditioning, shared: SharedGradients
    ) -> Buffer:
        b = self.b
        dskip, dy2 = b.pass_through(dx2, b.producers(self.x2), {"dx1_skip": 0, "dy2": 1})
        weight, dweight = self._weight(w, "cross.o"), self._weight(dw, "cross.o")
        dco = tensor.row_backward(b, dy2, self.y2, self.co, weight, dweight, "dy2_gathered", "dcross_o")
        dcq, dckv = b.op(
            "cross_attention_backward",
            [dco, self.cq, self.ckv, self.co, self.clse, cond.mask],
            ("dcross_q", "dcross_kv"),
            of=b.producer(self.co),
            gradient=dco,
            wrt={0: 0, 1: 1},
        )
        tensor.linear_weight_backward(b, dckv, self.ckv, cond.text, self._weight(dw, "cross.kv"))
        shared.text = tensor.linear_input_backward(
            b,
            dckv,
            self.ckv,
            self._weight(w, "cross.kv"),
            "dcontext",
            add_to=shared.text,
            dtype=b.plan.stat_dtype,
        )
        dx1g = tensor.column_input_backward(b, self.cross, dcq, self._weight(w, "cross.q"), "dx1_gathered", others=None)
        tensor.linear_weight_backward(b, dcq, self.cross.first, self.cross.gathered, self._weight(dw, "cross.q"))
        dx1 = tensor.gather_tokens_backward(b, dx1g, self.cross, "dx1_of_cross")
        return b.op("add", [dx1], "dx1", add_to=dskip)[0]

    def _self_attention_backward(self, w: Weights, dw: Weights, dx1: Buffer, drows: tuple[Buffer, ...]) -> Buffer:
        b, r = self.b, self.rows
        dy1, dskip = self._gate_backward(dx1, self.x1, self.y1.out, r[GATE1], drows[GATE1], "dy1", "dx0_skip")
        weight, dweight = self._weight(w, "o"), self._weight(dw, "o")
        do = tensor.row_backward(b, dy1, self.y1, self.o, weight, dweight, "dy1_gathered", "do")
        dq = self.attention.backward(do)
        of_q = tensor.linear_input_backward(b, dq, self.q, self._weight(w, "q"), "dh1_of_q")
        tensor.linear_weight_backward(b, dq, self.q, self.qkv.gathered, self._weight(dw, "q"))
        dkv = self.attention.join()
        dh1g = tensor.column_input_backward(b, self.qkv, dkv, self._weight(w, "kv"), "dh1_gathered", others=of_q)
        tensor.linear_weight_backward(b, dkv, self.qkv.first, self.qkv.gathered, self._weight(dw, "kv"))
        dh1 = tensor.gather_tokens_backward(b, dh1g, self.qkv, "dh1")
        return self._norm_backward(
            dh1,
            self.h1,
            (self.x0, self.rstd1, self._weight(w, "norm1"), r[SCALE1]),
            (self._weight(dw, "norm1"), drows[SCALE1], drows[SHIFT1]),
            dskip,
            "dx0",
        )
