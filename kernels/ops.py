"""The op table: one row says all that holds for every record of an op (torch-free).

What an op computes stands under the same name in ``reference.py``, what else can run it in ``catalogue.py``; every
other list of ops derives from these rows. To add one: a row, the function, and an example in tests/kernels/examples.py,
on which values and every column are checked. Labels of signatures:

    t local or gathered video tokens   s all tokens (keys)   b samples   d width   h heads   k head dim   f ffn
    l text tokens   w encoder width    p values of a patch   r modulation rows    c the K,V pair   n flat elements
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .counts import NONE, Measure, Operands, count, sized
from .op_spec import OpSpec
from .signature import Signature, parse

# Draws run in chunks of this many elements: philox keeps some twenty 64-bit temporaries as large as its output.
DRAW_CHUNK = 1 << 14
# A draw's counter has four words of 32 bits: element / 4, sample id, step, purpose + PURPOSES * place.
PURPOSES, MOST_PLACES, MOST_IDS, MOST_ELEMENTS = 1 << 8, 1 << 24, 1 << 32, 1 << 34
# AdamW and the sum of squares walk the flat shard in chunks of this many elements: temporaries stay in cache.
FLAT_CHUNK = 1 << 16


# -- counts that depend on more than labels ---------------------------------------------------------------------------


def _is_cast(o: Operands) -> bool:
    """fp32 out of bf16 factors: torch's CPU matmul cannot, so both factors are cast first."""
    return o.inputs[0].dtype != o.outputs[0].dtype


def _cast_factors(o: Operands) -> int:
    """Bytes of both factors, cast."""
    return sum(x.elements for x in o.inputs[:2]) * o.item_bytes[1] if _is_cast(o) else 0


def _fused_attention(o: Operands) -> int:
    """Torch's fused kernel on a CPU: its own outputs, before they are copied into ours, and a key mask as floats."""
    masked = o.inputs[-1].dtype == "bool"
    return sum(x.bytes for x in o.outputs) + (o.inputs[-1].elements * (o.item_bytes[0] + 1) if masked else 0)


def _each(times: Measure, each: Measure, first: Measure = NONE) -> Measure:
    """``each`` so many times, besides ``first``."""
    return lambda o: first(o) + times(o) * each(o)


def _inputs(o: Operands) -> int:
    return len(o.inputs)


def _pairs(o: Operands) -> int:
    return len(o.inputs) // 2


def _flat_chunks(o: Operands) -> int:
    return -(-o.sizes["n"] // FLAT_CHUNK)


def _drawn_rows(o: Operands) -> int:
    """Tokens that are drawn at once."""
    return min(o.sizes["t"], max(1, DRAW_CHUNK // (o.sizes["b"] * o.sizes["p"])))


def _draws(o: Operands) -> int:
    return -(-o.sizes["t"] // _drawn_rows(o))


def _out(o: Operands) -> int:
    return o.outputs[0].elements


def _is_sum(o: Operands) -> bool:
    """Not a permutation alone."""
    return o.inputs[0].elements > _out(o)


def _gaps(o: Operands) -> int:
    """Bytes of a flat gradient's gaps."""
    return sum(stop - start for start, stop in o.attrs["gaps"]) * o.item_bytes[0]


# -- the table --------------------------------------------------------------------------------------------------------

OPS: Mapping[str, OpSpec] = {
    # -- products -----------------------------------------------------------------------------------------------
    "matmul": OpSpec(
        None,
        linear=((0,), (1,)),
        adds=True,
        law="matmul",
        leaves_sms=True,
        flops=lambda o: 2 * math.prod(o.sizes.values()),
        kernels=lambda o: 3 if _is_cast(o) else 1,
        plain_bytes=lambda o: sum(x.bytes for x in (*o.inputs[:2], *o.outputs)) + 2 * _cast_factors(o),
        workspace=_cast_factors,
    ),
    # q, kv (gathered over cp), [key mask] -> o, log-sum-exp.  o = softmax(q k^T / sqrt(K)) v; no causal mask, ever
    "attention": OpSpec(
        "tbhk,sbchk->tbhk,bht",
        whole="sck",
        statistics=(1,),
        law="attention",
        leaves_sms=True,
        flops=count(tsbhk=4),
        kernels=count(10),
        plain_bytes=sized(count(tbhk=2, sbhk=3), count(tsbh=7, tbhk=4, sbhk=7, tbh=1)),
        workspace=_fused_attention,
    ),
    "cross_attention": OpSpec(
        "tbhk,sbchk,bs->tbhk,bht",
        whole="sck",
        statistics=(1,),
        law="attention",
        flops=count(tsbhk=4),
        kernels=count(12),
        plain_bytes=sized(count(tbhk=2, sbhk=3), count(tsbh=9, tbhk=4, sbhk=7, tbh=1), own=count(bs=3)),
        workspace=_fused_attention,
    ),
    # do, q, kv, o, lse -> dq, dkv.  Five products: scores again, dv, dp, dq, dk
    "attention_backward": OpSpec(
        "tbhk,tbhk,sbchk,tbhk,bht->tbhk,sbchk",
        linear=((0,),),
        whole="sck",
        law="attention",
        backward=True,
        leaves_sms=True,
        flops=count(tsbhk=10),
        kernels=count(23),
        plain_bytes=sized(count(tbhk=4, sbhk=4), count(tsbh=18, tbhk=13, sbhk=15, tbh=3)),
        workspace=lambda o: _fused_attention(o) + o.inputs[4].bytes,  # the log-sum-exp in the kernel's layout
    ),
    "cross_attention_backward": OpSpec(
        "tbhk,tbhk,sbchk,tbhk,bht,bs->tbhk,sbchk",
        linear=((0,),),
        whole="sck",
        law="attention",
        backward=True,
        flops=count(tsbhk=10),
        kernels=count(25),
        plain_bytes=sized(count(tbhk=4, sbhk=4), count(tsbh=20, tbhk=13, sbhk=15, tbh=3), own=count(bs=3)),
        workspace=lambda o: _fused_attention(o) + o.inputs[4].bytes,
    ),
    # o and log-sum-exp over parts of the keys, one pair after the other -> over all keys
    "merge_attention": OpSpec(
        None,
        statistics=(1,),
        flops=_each(_pairs, count(tbhk=2, tbh=6), count(tbh=-4)),
        kernels=_each(_pairs, count(7), count(4)),
        plain_bytes=_each(
            _pairs,
            sized(count(tbhk=3), count(tbhk=4, tbh=10), own=count(tbh=2)),
            sized(count(tbhk=1), count(tbhk=2, tbh=2), own=count(tbh=2)),
        ),
        workspace=sized(count(tbhk=1), count(tbh=2), own=count(tbh=1), cast=count(tbhk=2)),
    ),
    # addends of one shape -> their sum, of bf16 in fp32
    "sum_parts": OpSpec(
        None,
        flops=_each(_inputs, _out, lambda o: -_out(o)),
        kernels=_each(_inputs, count(1), count(1)),
        plain_bytes=_each(_inputs, sized(_out, own=lambda o: 8 * _out(o)), sized(_out)),
        workspace=lambda o: 4 * _out(o) if o.outputs[0].dtype == "bfloat16" else 0,
    ),
    # x, gain, scale, shift -> x / rms(x) * gain * (1 + scale) + shift, 1 / rms(x)
    "modulate_norm": OpSpec(
        "tbd,d,bd,bd->tbd,tb",
        whole="d",
        statistics=(1,),
        flops=count(tbd=5, tb=5, bd=2),
        kernels=count(12),
        plain_bytes=sized(count(tbd=2, bd=6, d=1), count(tbd=9, tb=10)),
        workspace=sized(wide=count(bd=2), cast=count(tbd=3)),
    ),
    # x, position, gain, scale, shift -> x0 = x + position, the modulated norm of x0, 1 / rms(x0)
    "position_modulate_norm": OpSpec(
        "tbd,td,d,bd,bd->tbd,tbd,tb",
        whole="d",
        statistics=(2,),
        flops=count(tbd=6, tb=5, bd=2),
        kernels=count(13),
        plain_bytes=sized(count(tbd=4, td=1, bd=6, d=1), count(tbd=9, tb=10)),
        workspace=sized(wide=count(bd=2), cast=count(tbd=3)),
    ),
    # dy, x, rstd, gain, scale -> dx (+ residual gradient), dgain, dscale, dshift
    "modulate_norm_backward": OpSpec(
        "tbd,tbd,tb,d,bd->tbd,d,bd,bd",
        linear=((0,),),
        whole="d",
        adds=True,
        backward=True,
        flops=count(tbd=10, tb=1, bd=6),
        kernels=count(20),
        plain_bytes=sized(count(tbd=3, bd=1, d=1), count(tbd=18, tb=6, bd=17, d=4)),
        workspace=sized(wide=count(tbd=2, tb=2, bd=3), cast=count(tbd=1, bd=1, d=1)),
    ),
    # x, gain, bias -> layer norm, mean, 1 / std
    "layer_norm": OpSpec(
        "lbd,d,d->lbd,lb,lb",
        whole="d",
        statistics=(1, 2),
        flops=count(lbd=7, lb=6),
        kernels=count(12),
        plain_bytes=sized(count(lbd=2, d=2), count(lbd=12, lb=12)),
        workspace=sized(wide=count(lbd=1), cast=count(lbd=1)),
    ),
    # dy, x, mean, rstd, gain -> dx, dgain, dbias; dy comes in the statistics' dtype
    "layer_norm_backward": OpSpec(
        "lbd,lbd,lb,lb,d->lbd,d,d",
        linear=((0,),),
        whole="d",
        backward=True,
        flops=count(lbd=13, lb=2),
        kernels=count(14),
        plain_bytes=sized(count(lbd=2, d=1), count(lbd=25, lb=7, d=2)),
        workspace=sized(wide=count(lbd=3, lb=1)),
    ),
    # -- token-local --------------------------------------------------------------------------------------------
    "add_position": OpSpec("tbd,td->tbd", flops=count(tbd=1)),
    "add": OpSpec("tbd->tbd", linear=((0,),), adds=True),  # onto the last input
    "residual": OpSpec("tbd,tbd->tbd", linear=((0, 1),), flops=count(tbd=1)),
    "gated_residual": OpSpec("tbd,tbd,bd->tbd", flops=count(tbd=2)),  # x, y, gate -> x + gate * y
    # dout, y, gate -> dy, dgate
    "gated_residual_backward": OpSpec(
        "tbd,tbd,bd->tbd,bd",
        linear=((0,),),
        backward=True,
        flops=count(tbd=3),
        kernels=count(4),
        plain_bytes=sized(count(tbd=4, bd=1), count(tbd=4, bd=1)),
        workspace=sized(wide=count(tbd=1), cast=count(tbd=1)),
    ),
    # gate, up -> silu(gate) * up
    "swiglu": OpSpec("tbf,tbf->tbf", flops=count(tbf=4), kernels=count(2), plain_bytes=sized(count(tbf=5))),
    # dy, gate, up -> dgate, dup
    "swiglu_backward": OpSpec(
        "tbf,tbf,tbf->tbf,tbf",
        linear=((0,),),
        backward=True,
        flops=count(tbf=13),
        kernels=count(4),
        plain_bytes=sized(count(tbf=11)),
    ),
    # -- embeddings and conditioning ----------------------------------------------------------------------------
    "patchify": OpSpec(  # a rank takes the tokens that it holds
        "bcfyx->tbp",
        whole="cfyx",
        bytes=sized(count(tbp=2)),
        kernels=count(7),
        plain_bytes=sized(count(tbp=4), own=count(t=96)),
        workspace=sized(count(tbp=1), own=count(t=32)),
    ),
    "unpatchify": OpSpec("tbp->bcfyx", whole="tp"),
    "position": OpSpec(
        "id,jd,kd->td",
        whole="ijkd",
        flops=count(td=2),
        kernels=count(10),
        plain_bytes=sized(count(td=12), own=count(t=96)),
        workspace=sized(count(td=1), own=count(t=32)),
    ),
    "position_backward": OpSpec(
        "td->id,jd,kd",
        linear=((0,),),
        whole="ijkd",
        backward=True,
        flops=count(td=3),
        kernels=count(11),
        plain_bytes=sized(count(td=9, id=1, jd=1, kd=1), own=count(t=96)),
        workspace=count(t=32),
    ),
    "time_features": OpSpec(
        "b->bw",
        flops=count(bw=1.5, w=1, b=1),
        kernels=count(9),
        plain_bytes=sized(count(bw=1), count(bw=3.5, w=3, b=3)),
        workspace=sized(wide=count(bw=1, w=0.5, b=1)),
    ),
    "silu": OpSpec("bd->bd", flops=count(bd=3)),
    "silu_backward": OpSpec(
        "bd,bd->bd",
        linear=((0,),),
        adds=True,
        backward=True,
        flops=count(bd=8),
        kernels=count(3),
        plain_bytes=sized(count(bd=1), count(bd=6)),
        workspace=sized(wide=count(bd=1), cast=count(bd=1)),
    ),
    # modulation shared by the layers + this layer's table, e.g. "drb,rd->rbd"
    "add_table": OpSpec(None, flops=_out),
    # sum or permute: "rbd->rd"
    "sum_to": OpSpec(
        None,
        linear=((0,),),
        adds=True,
        flops=lambda o: o.inputs[0].elements if _is_sum(o) else 0,
        kernels=lambda o: 2 if _is_sum(o) else 1,
        plain_bytes=lambda o: o.inputs[0].bytes + (3 if _is_sum(o) else 1) * o.outputs[0].bytes,
        workspace=lambda o: o.outputs[0].bytes if _is_sum(o) else 0,
    ),
    "drop_caption": OpSpec("lbw,b->lbw", flops=count(lbw=1)),  # zero the embeddings of a dropped caption
    "drop_mask": OpSpec("bs,b->bs"),  # every key of a dropped caption is valid
    # -- flow matching ------------------------------------------------------------------------------------------
    "draw_time": OpSpec(
        "b,b,n->b",
        flops=count(b=14),
        kernels=count(149),
        plain_bytes=sized(count(b=1), own=count(32, b=2685)),
        workspace=count(b=120),
    ),
    "draw_noise": OpSpec(
        "b,b,n->tbp",
        flops=count(tbp=11),
        kernels=_each(_draws, count(148), count(23)),
        plain_bytes=_each(_draws, count(32, b=64, p=8), sized(count(tbp=1), own=count(tbp=2488, tp=109, t=176, p=224))),
        workspace=lambda o: count(t=32, p=48)(o) + _drawn_rows(o) * count(bp=104, p=16)(o),
    ),
    "draw_keep_caption": OpSpec(
        "b,b,n->b", flops=count(b=2), kernels=count(139), plain_bytes=count(32, b=2497), workspace=count(b=120)
    ),
    # x1, x0, t -> x_t, velocity
    "interpolate": OpSpec(
        "tbp,tbp,b->tbp,tbp",
        flops=count(tbp=5, b=2),
        kernels=count(7),
        plain_bytes=sized(count(tbp=1), count(tbp=11, b=6)),
        workspace=sized(wide=count(tbp=2, b=1)),
    ),
    # velocities of halves of guided samples, what each counts -> their sum; counted for the one half of a rank
    "weigh": OpSpec("tgbp,g->tbp", linear=((0,),), flops=count(tbp=1)),
    # prediction, velocity -> sum of squares / (elements of the GLOBAL buffer * micro-batches): Partial over every axis
    "velocity_loss": OpSpec(
        "tbp,tbp->",
        adds=True,
        flops=count(1, tbp=3),
        kernels=count(6),
        plain_bytes=sized(count(tbp=1), count(5, tbp=7)),
        workspace=sized(wide=count(1, tbp=1), cast=count(tbp=1)),
    ),
    "velocity_loss_backward": OpSpec(
        "tbp,tbp->tbp",
        backward=True,
        flops=count(tbp=2),
        kernels=count(4),
        plain_bytes=sized(count(tbp=2), count(tbp=7)),
        workspace=sized(wide=count(tbp=1), cast=count(tbp=1)),
    ),
    # -- flat units and the optimizer ---------------------------------------------------------------------------
    **dict.fromkeys(("cast", "copy"), OpSpec(None, linear=((0,),))),
    "scale": OpSpec(None, linear=((0,),), flops=_out),  # times ``factor``
    "accumulate": OpSpec(None, linear=((0,),), adds=True),  # addend, total: total += addend
    # alignment gaps and tail padding of a flat gradient
    "zero_gaps": OpSpec(
        None,
        linear=((0,),),
        in_place={0: 0},
        fresh=True,
        bytes=_gaps,
        kernels=lambda o: len(o.attrs["gaps"]),
        counted=("gaps",),
    ),
    "sum_of_squares": OpSpec(
        "rn->",
        flops=_each(_flat_chunks, count(1), count(n=2)),
        kernels=_each(_flat_chunks, count(2), count(1)),
        plain_bytes=sized(_each(_flat_chunks, count(4), count(1, n=1))),
        workspace=sized(count(1)),
    ),
    # sum of squares, counters -> gradient norm, clip factor, finite?, counters (step + 1, updates + finite)
    "clip_factor": OpSpec(
        ",n->,,,n",
        in_place={3: 1},
        flops=count(4),
        kernels=count(13),
        plain_bytes=sized(count(16), own=count(40)),
        workspace=sized(count(3)),
    ),
    # master, m, v, ema, gradient, clip factor, finite?, counters, lr -> master, m, v, ema. Counted for a shard that
    # decays whole, or not at all: where that changes within it, one chunk more is begun
    "adamw": OpSpec(
        "rn,rn,rn,rn,rn,,,q,->rn,rn,rn,rn",
        in_place={0: 0, 1: 1, 2: 2, 3: 3},
        flops=count(19, n=18),
        kernels=_each(_flat_chunks, count(13), count(23)),
        plain_bytes=sized(_each(_flat_chunks, count(8), count(47, n=31)), own=_each(_flat_chunks, count(1), count(25))),
        workspace=lambda o: sized(count(9))(o) + 2 * o.item_bytes[0] * min(FLAT_CHUNK, o.sizes["n"]),
    ),
}
LEAVE_SMS = tuple(op for op, spec in OPS.items() if spec.leaves_sms)


def signature_of(kind: str, attrs: Mapping[str, Any]) -> Signature:
    text = OPS[kind].signature or attrs["signature"]
    return parse(text)
