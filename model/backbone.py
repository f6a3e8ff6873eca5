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
from .block_parts import ModulatedNorm, add_bias, add_bias_backward
from .config import MODULATION_ROWS, ModelConfig
from .lora import factors_of

Weights = dict[str, Buffer]
DRows = tuple[Buffer | None, ...]  # places of gradients; None: of what is frozen

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

    def _product_name(self, name: str) -> str:
        """What a product is called whose sum with its bias, if there is one, is ``name``."""
        return f"{name}_product" if self.c.style.biases else name

    def _finished(self, w: Weights, name: str, x: Buffer, signature: str, product: Buffer) -> Buffer:
        """A product split over its outputs, with what its factors make of x and its bias."""
        product = self._adapted(w, name, x, signature, product)
        if not self.c.style.biases:
            return product
        called = name.replace(".", "_")
        return add_bias(self.b, product, self._weight(w, f"{name}_bias"), _biased(signature), called)

    def _finished_backward(self, dw: Weights, name: str, dy: Buffer, y: Buffer, signature: str) -> Buffer:
        """The gradient of the product behind ``y``; the bias's goes to ``dw``."""
        if not self.c.style.biases:
            return dy
        dbias, called = self._gradient(dw, f"{name}_bias"), name.replace(".", "_")
        return add_bias_backward(self.b, dy, y, dbias, _biased(signature), called, f"d{called}_product")

    def _row(self, w: Weights, name: str, y: Buffer, signature: str, partial: str, out: str) -> tensor.Row:
        """The product of a row with its factors and bias."""
        below = self._adapt(w, name, y, signature, None)
        return tensor.row(self.b, y, self._weight(w, name), signature, partial, self._product_name(out), below)

    def _row_out(self, w: Weights, name: str, layer: tensor.Row, out: str) -> Buffer:
        """What a row adds to the stream: its product, with the bias that it may have, once tp has summed it."""
        if not self.c.style.biases:
            return layer.out
        return add_bias(self.b, layer.out, self._weight(w, f"{name}_bias"), "tbo,o->tbo", out, by_token=True)

    def forward(self, w: Weights, x: Buffer, cond: Conditioning) -> Buffer:
        """x [T, B, D] split by (cp, tp), by ``w`` of this block's unit and what all blocks share -> the same placed."""
        b = self.b
        (self.x0,) = tensor.token_local(b, "add_position", [x, cond.position], ["x0"], (0, 1))
        (self.modulation,) = b.op(
            "add_table",
            [cond.modulation, self._weight(w, "table")],
            "modulation",
            signature="drb,rd->rbd",
        )
        self.rows = rows(b, self.modulation, ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2"))
        r = self.rows

        self.norm1 = ModulatedNorm(b, self.c, w.get(f"{self.unit}.norm1"))
        h1 = self.norm1.forward(self.x0, r[SCALE1], r[SHIFT1], "h1", "rstd1")
        # K and V first: they are on their way over cp while q is computed.
        self.qkv = tensor.column(b, h1, "h1_gathered", [(self._weight(w, "kv"), OF_KV, self._product_name("kv"))])
        self.kv = self._finished(w, "kv", self.qkv.gathered, OF_KV, self.qkv.outputs[0])
        self.attention = context.split(b, self.kv)
        self.q_product = tensor.linear(b, self.qkv.gathered, self._weight(w, "q"), OF_Q, self._product_name("q"))
        self.q = self._finished(w, "q", self.qkv.gathered, OF_Q, self.q_product)
        self.o = self.attention.forward(self.q)
        self.y1 = self._row(w, "o", self.o, OF_O, "y1_partial", "y1")
        self.branch1 = self._row_out(w, "o", self.y1, "y1")
        (self.x1,) = tensor.token_local(b, "gated_residual", [self.x0, self.branch1, r[GATE1]], ["x1"], (0, 1))

        # Needs nothing of this block: it runs while the tokens are on their way.
        text_kv = self._product_name("cross_kv")
        self.ckv_product = tensor.linear(b, cond.text, self._weight(w, "cross.kv"), OF_TEXT_KV, text_kv)
        self.ckv = self._finished(w, "cross.kv", cond.text, OF_TEXT_KV, self.ckv_product)
        query = (self._weight(w, "cross.q"), OF_Q, self._product_name("cross_q"))
        self.cross = tensor.column(b, self.x1, "x1_gathered", [query])
        self.cq = self._finished(w, "cross.q", self.cross.gathered, OF_Q, self.cross.outputs[0])
        self.co, self.clse = b.op(
            "cross_attention",
            [self.cq, self.ckv, cond.mask],
            ("cross_o", "cross_lse"),
            dtypes=(x.dtype, b.plan.stat_dtype),
        )
        self.y2 = self._row(w, "cross.o", self.co, OF_O, "y2_partial", "y2")
        self.branch2 = self._row_out(w, "cross.o", self.y2, "y2")
        (self.x2,) = tensor.token_local(b, "residual", [self.x1, self.branch2], ["x2"], (0, 1))

        self.norm2 = ModulatedNorm(b, self.c, w.get(f"{self.unit}.norm2"))
        h2 = self.norm2.forward(self.x2, r[SCALE2], r[SHIFT2], "h2", "rstd2")
        self.act = self._hidden(w, h2)
        self.y3 = self._row(w, "down", self.act, OF_DOWN, "y3_partial", "y3")
        self.branch3 = self._row_out(w, "down", self.y3, "y3")
        (self.out,) = tensor.token_local(b, "gated_residual", [self.x2, self.branch3, r[GATE2]], ["x"], (0, 1))
        return self.out

    def _hidden(self, w: Weights, h2: Buffer) -> Buffer:
        """Values between the products of the feed-forward part."""
        b, names = self.b, ("gate", "up") if self.c.style.gated else ("up",)
        products = [(self._weight(w, name), OF_FFN, self._product_name(name)) for name in names]
        self.ffn = tensor.column(b, h2, "h2_gathered", products)
        self.up_product = self.ffn.outputs[-1]
        made = zip(names, self.ffn.outputs, strict=True)
        self.hidden = [self._finished(w, name, self.ffn.gathered, OF_FFN, product) for name, product in made]
        return b.op("swiglu" if self.c.style.gated else "activate", self.hidden, "act")[0]

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

    def _row_backward(
        self, w: Weights, dw: Weights, name: str, dout: Buffer, layer: tensor.Row, y: Buffer, dy: str, out: Buffer
    ) -> Buffer:
        """The gradient of a row's input ``y``, for that of its ``out``; those of its weights go to ``dw``."""
        gathered = f"{dout.role}_gathered"
        if self.c.style.biases:
            dbias, called = self._gradient(dw, f"{name}_bias"), name.replace(".", "_")
            dout = add_bias_backward(self.b, dout, out, dbias, "tbo,o->tbo", called, f"{dout.role}_product")
        weight, dweight = self._weight(w, name), self._gradient(dw, name)
        dz, made = tensor.row_backward(self.b, dout, layer, y, weight, dweight, gathered, dy)
        return self._adapt_backward(dw, name, dz, y, made) or made

    def _ffn_backward(self, w: Weights, dw: Weights, dout: Buffer, drows: DRows) -> Buffer:
        b, r = self.b, self.rows
        dy3, dskip = self._gate_backward(dout, self.out, self.branch3, r[GATE2], drows[GATE2], "dy3", "dx2_skip")
        dact = self._row_backward(w, dw, "down", dy3, self.y3, self.act, "dact", self.branch3)
        parts = self._hidden_backward(w, dw, dact)
        dh2 = tensor.gather_tokens_backward(b, parts, self.ffn, "dh2")
        places = (self._gradient(dw, "norm2"), drows[SCALE2], drows[SHIFT2])
        return self.norm2.backward(dh2, dskip, "dx2", *places)

    def _hidden_backward(self, w: Weights, dw: Weights, dact: Buffer) -> list[Buffer]:
        """The gradient of what the feed-forward part's first products read, slice by slice; weights' go to ``dw``."""
        b, x, gated = self.b, self.ffn.gathered, self.c.style.gated
        made = b.op(
            "swiglu_backward" if gated else "activate_backward",
            [dact, *self.hidden],
            ("dgate", "dup") if gated else "dup",
            of=b.producer(self.act),
            gradient=dact,
            wrt={i: i for i in range(len(self.hidden))},
        )
        dup = self._finished_backward(dw, "up", made[-1], self.hidden[-1], OF_FFN)
        others = self._adapt_backward(dw, "up", dup, x)
        if not gated:
            parts = tensor.column_input_backward(b, self.ffn, dup, self._weight(w, "up"), "dh2_gathered", others=others)
            tensor.linear_weight_backward(b, dup, self.ffn.first, x, self._gradient(dw, "up"))
            return parts
        dgate = self._finished_backward(dw, "gate", made[0], self.hidden[0], OF_FFN)
        others = self._adapt_backward(dw, "gate", dgate, x, others)
        weight = self._weight(w, "up")
        of_up = tensor.linear_input_backward(b, dup, self.up_product, weight, "dh2_of_up", add_to=others)
        parts = tensor.column_input_backward(b, self.ffn, dgate, self._weight(w, "gate"), "dh2_gathered", others=of_up)
        tensor.linear_weight_backward(b, dup, self.up_product, x, self._gradient(dw, "up"))
        tensor.linear_weight_backward(b, dgate, self.ffn.first, x, self._gradient(dw, "gate"))
        return parts

    def _cross_attention_backward(
        self, w: Weights, dw: Weights, dx2: Buffer, cond: Conditioning, shared: SharedGradients
    ) -> Buffer:
        b = self.b
        dskip, dy2 = b.pass_through(dx2, b.producers(self.x2), {"dx1_skip": 0, "dy2": 1})
        dco = self._row_backward(w, dw, "cross.o", dy2, self.y2, self.co, "dcross_o", self.branch2)
        dcq, dckv = b.op(
            "cross_attention_backward",
            [dco, self.cq, self.ckv, self.co, self.clse, cond.mask],
            ("dcross_q", "dcross_kv"),
            of=b.producer(self.co),
            gradient=dco,
            wrt={0: 0, 1: 1},
        )
        dckv = self._finished_backward(dw, "cross.kv", dckv, self.ckv, OF_TEXT_KV)
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
        dcq = self._finished_backward(dw, "cross.q", dcq, self.cq, OF_Q)
        weight, x = self._weight(w, "cross.q"), self.cross.gathered
        others = self._adapt_backward(dw, "cross.q", dcq, x)
        dx1g = tensor.column_input_backward(b, self.cross, dcq, weight, "dx1_gathered", others=others)
        tensor.linear_weight_backward(b, dcq, self.cross.first, x, self._gradient(dw, "cross.q"))
        dx1 = tensor.gather_tokens_backward(b, dx1g, self.cross, "dx1_of_cross")
        return b.op("add", [dx1], "dx1", add_to=dskip)[0]

    def _self_attention_backward(self, w: Weights, dw: Weights, dx1: Buffer, drows: DRows) -> Buffer:
        b, r, x = self.b, self.rows, self.qkv.gathered
        dy1, dskip = self._gate_backward(dx1, self.x1, self.branch1, r[GATE1], drows[GATE1], "dy1", "dx0_skip")
        do = self._row_backward(w, dw, "o", dy1, self.y1, self.o, "do", self.branch1)
        dq = self._finished_backward(dw, "q", self.attention.backward(do), self.q, OF_Q)
        others = self._adapt_backward(dw, "q", dq, x)
        weight = self._weight(w, "q")
        of_q = tensor.linear_input_backward(b, dq, self.q_product, weight, "dh1_of_q", add_to=others)
        tensor.linear_weight_backward(b, dq, self.q_product, x, self._gradient(dw, "q"))
        dkv = self._finished_backward(dw, "kv", self.attention.join(), self.kv, OF_KV)
        others = self._adapt_backward(dw, "kv", dkv, x, of_q)
        dh1g = tensor.column_input_backward(b, self.qkv, dkv, self._weight(w, "kv"), "dh1_gathered", others=others)
        tensor.linear_weight_backward(b, dkv, self.qkv.first, x, self._gradient(dw, "kv"))
        dh1 = tensor.gather_tokens_backward(b, dh1g, self.qkv, "dh1")
        places = (self._gradient(dw, "norm1"), drows[SCALE1], drows[SHIFT1])
        return self.norm1.backward(dh1, dskip, "dx0", *places)


def _biased(signature: str) -> str:
    """Of a product's output and its bias: ``tbi,ihk->tbhk`` makes ``tbhk,hk->tbhk``."""
    left, out = signature.split("->")
    inputs, weight = left.split(",")
    return f"{out},{''.join(label for label in weight if label not in inputs)}->{out}"
