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

from dataclasses import dataclass
from functools import partial

from ..parallel.ir.builder import Builder
from ..parallel.ir.records import Buffer
from ..parallel.layers import context, tensor
from .block_parts import BlockProduct, DRows, ModulatedNorm, RowProduct, Weights, modulation_gradient, rows
from .config import MODULATION_ROWS, ModelConfig

OF_Q, OF_KV, OF_TEXT_KV, OF_O = "tbi,ihk->tbhk", "tbi,ichk->tbchk", "lbi,ichk->lbchk", "tbhk,hko->tbo"
OF_FFN, OF_DOWN = "tbi,if->tbf", "tbf,fo->tbo"
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


class Block:
    """One transformer block. ``forward`` remembers the buffers that ``backward`` differentiates."""

    def __init__(self, b: Builder, c: ModelConfig, unit: str) -> None:
        self.b, self.c, self.unit = b, c, unit

    def forward(self, w: Weights, x: Buffer, cond: Conditioning) -> Buffer:
        """x [T, B, D] split by (cp, tp), by ``w`` of this block's unit and what all blocks share -> the same placed."""
        b = self.b
        of, row = partial(BlockProduct, b, self.c, w, self.unit), partial(RowProduct, b, self.c, w, self.unit)
        (self.x0,) = tensor.token_local(b, "add_position", [x, cond.position], ["x0"], (0, 1))
        (self.modulation,) = b.op(
            "add_table",
            [cond.modulation, w[f"{self.unit}.table"]],
            "modulation",
            signature="drb,rd->rbd",
        )
        self.rows = rows(b, self.modulation, ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2"))
        r = self.rows

        self.norm1 = ModulatedNorm(b, self.c.block_eps, w.get(f"{self.unit}.norm1"))
        h1 = self.norm1.forward(self.x0, r[SCALE1], r[SHIFT1], "h1", "rstd1")
        # K and V first: they are on their way over cp while q is computed.
        self.kv, self.q, self.o = of("kv", OF_KV), of("q", OF_Q), row("o", OF_O, "y1")
        self.qkv = tensor.column(b, h1, "h1_gathered", [self.kv.in_column])
        self.attention = context.split(b, self.kv.finish(self.qkv.gathered, self.qkv.outputs[0]))
        branch1 = self.o.forward(self.attention.forward(self.q.forward(self.qkv.gathered)))
        (self.x1,) = tensor.token_local(b, "gated_residual", [self.x0, branch1, r[GATE1]], ["x1"], (0, 1))

        # Needs nothing of this block: it runs while the tokens are on their way.
        self.ckv, self.cq, self.co = of("cross.kv", OF_TEXT_KV), of("cross.q", OF_Q), row("cross.o", OF_O, "y2")
        text_kv = self.ckv.forward(cond.text)
        self.cross = tensor.column(b, self.x1, "x1_gathered", [self.cq.in_column])
        query = self.cq.finish(self.cross.gathered, self.cross.outputs[0])
        attended, self.clse = b.op(
            "cross_attention",
            [query, text_kv, cond.mask],
            ("cross_o", "cross_lse"),
            dtypes=(x.dtype, b.plan.stat_dtype),
        )
        branch2 = self.co.forward(attended)
        (self.x2,) = tensor.token_local(b, "residual", [self.x1, branch2], ["x2"], (0, 1))

        self.norm2 = ModulatedNorm(b, self.c.block_eps, w.get(f"{self.unit}.norm2"))
        h2 = self.norm2.forward(self.x2, r[SCALE2], r[SHIFT2], "h2", "rstd2")
        self.hidden = [of(name, OF_FFN) for name in (("gate", "up") if self.c.style.gated else ("up",))]
        self.ffn = tensor.column(b, h2, "h2_gathered", [product.in_column for product in self.hidden])
        made = zip(self.hidden, self.ffn.outputs, strict=True)
        values = [product.finish(self.ffn.gathered, output) for product, output in made]
        (act,) = b.op("swiglu" if self.c.style.gated else "activate", values, "act")
        self.down = row("down", OF_DOWN, "y3")
        branch3 = self.down.forward(act)
        (self.out,) = tensor.token_local(b, "gated_residual", [self.x2, branch3, r[GATE2]], ["x"], (0, 1))
        return self.out

    def backward(self, dw: Weights, dout: Buffer, cond: Conditioning, shared: SharedGradients) -> Buffer:
        """Gradient of the block's input; weight gradients go to ``dw``, shared ones are added to ``shared``."""
        b, stat = self.b, self.b.plan.stat_dtype
        names = ("dshift1", "dscale1", "dgate1", "dshift2", "dscale2", "dgate2")
        dmodulation, drows = modulation_gradient(b, self.modulation, names)

        dx2 = self._ffn_backward(dw, dout, drows)
        dx1 = self._cross_attention_backward(dw, dx2, cond, shared)
        dx0 = self._self_attention_backward(dw, dx1, drows)

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
            into={0: dw[f"{self.unit}.table"]},
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
        self, dout: Buffer, out: Buffer, branch: BlockProduct, gate: Buffer, dgate: Buffer | None, dx: str
    ) -> tuple[Buffer, Buffer]:
        """Gradients of the branch y and of the residual stream of ``out = x + gate * y``."""
        b = self.b
        of = b.producers(out)
        dbranch, _ = b.op(
            "gated_residual_backward",
            [dout, branch.out, gate],
            (f"d{branch.called}", f"d{gate.role}_sum"),
            dtypes=(dout.dtype, b.plan.stat_dtype),
            into={1: dgate} if dgate else None,
            of=of,
            gradient=dout,
            wrt={0: 1, 1: 2},
        )
        (dskip,) = b.pass_through(dout, of, {dx: 0})
        return dbranch, dskip

    def _ffn_backward(self, dw: Weights, dout: Buffer, drows: DRows) -> Buffer:
        dy3, dskip = self._gate_backward(dout, self.out, self.down, self.rows[GATE2], drows[GATE2], "dx2_skip")
        parts = self._hidden_backward(dw, self.down.backward(dw, dy3, "dact"))
        dh2 = tensor.gather_tokens_backward(self.b, parts, self.ffn, "dh2")
        places = (dw.get(f"{self.unit}.norm2"), drows[SCALE2], drows[SHIFT2])
        return self.norm2.backward(dh2, dskip, "dx2", *places)

    def _hidden_backward(self, dw: Weights, dact: Buffer) -> list[Buffer]:
        """The gradient of what the feed-forward part's first products read, slice by slice; weights' go to ``dw``."""
        b, gated, up = self.b, self.c.style.gated, self.hidden[-1]
        made = b.op(
            "swiglu_backward" if gated else "activate_backward",
            [dact, *(product.out for product in self.hidden)],
            ("dgate", "dup") if gated else "dup",
            of=b.producer(self.down.x),
            gradient=dact,
            wrt={i: i for i in range(len(self.hidden))},
        )
        dup = up.product_backward(dw, made[-1])
        others = up.factors_backward(dw, dup)
        if not gated:
            parts = tensor.column_input_backward(b, self.ffn, dup, up.weight, "dh2_gathered", others=others)
            up.weight_backward(dw, dup, self.ffn)
            return parts
        gate = self.hidden[0]
        dgate = gate.product_backward(dw, made[0])
        others = gate.factors_backward(dw, dgate, others)
        of_up = up.input_backward(dup, "dh2_of_up", others)
        parts = tensor.column_input_backward(b, self.ffn, dgate, gate.weight, "dh2_gathered", others=of_up)
        up.weight_backward(dw, dup)
        gate.weight_backward(dw, dgate, self.ffn)
        return parts

    def _cross_attention_backward(
        self, dw: Weights, dx2: Buffer, cond: Conditioning, shared: SharedGradients
    ) -> Buffer:
        b, stat = self.b, self.b.plan.stat_dtype
        dskip, dy2 = b.pass_through(dx2, b.producers(self.x2), {"dx1_skip": 0, "dy2": 1})
        dco = self.co.backward(dw, dy2, "dcross_o")
        dcq, dckv = b.op(
            "cross_attention_backward",
            [dco, self.cq.out, self.ckv.out, self.co.x, self.clse, cond.mask],
            ("dcross_q", "dcross_kv"),
            of=b.producer(self.co.x),
            gradient=dco,
            wrt={0: 0, 1: 1},
        )
        dckv = self.ckv.product_backward(dw, dckv)
        self.ckv.weight_backward(dw, dckv)
        shared.text = self.ckv.factors_backward(dw, dckv, shared.text)
        if b.needs_gradient(cond.text):
            shared.text = self.ckv.input_backward(dckv, "dcontext", shared.text, stat)
        dcq = self.cq.product_backward(dw, dcq)
        others = self.cq.factors_backward(dw, dcq)
        dx1g = tensor.column_input_backward(b, self.cross, dcq, self.cq.weight, "dx1_gathered", others=others)
        self.cq.weight_backward(dw, dcq, self.cross)
        dx1 = tensor.gather_tokens_backward(b, dx1g, self.cross, "dx1_of_cross")
        return b.op("add", [dx1], "dx1", add_to=dskip)[0]

    def _self_attention_backward(self, dw: Weights, dx1: Buffer, drows: DRows) -> Buffer:
        dy1, dskip = self._gate_backward(dx1, self.x1, self.o, self.rows[GATE1], drows[GATE1], "dx0_skip")
        do = self.o.backward(dw, dy1, "do")
        dq = self.q.product_backward(dw, self.attention.backward(do))
        of_q = self.q.input_backward(dq, "dh1_of_q", self.q.factors_backward(dw, dq))
        self.q.weight_backward(dw, dq)
        dkv = self.kv.product_backward(dw, self.attention.join())
        others = self.kv.factors_backward(dw, dkv, of_q)
        dh1g = tensor.column_input_backward(self.b, self.qkv, dkv, self.kv.weight, "dh1_gathered", others=others)
        self.kv.weight_backward(dw, dkv, self.qkv)
        dh1 = tensor.gather_tokens_backward(self.b, dh1g, self.qkv, "dh1")
        places = (dw.get(f"{self.unit}.norm1"), drows[SCALE1], drows[SHIFT1])
        return self.norm1.backward(dh1, dskip, "dx0", *places)
