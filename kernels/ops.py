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

from .counts import count, sized
from .measures import (
    FLAT_CHUNK,
    cast_factors,
    doubled,
    doublings,
    draw_count,
    drawn_rows,
    flat_chunks,
    fused_attention,
    gap_bytes,
    input_count,
    is_cast,
    is_sum,
    out,
    pair_count,
    times,
)
from .op_spec import OpSpec
from .signature import Signature, parse

# A draw's counter has four words of 32 bits: element / 4, sample id, step, purpose + PURPOSES * place.
PURPOSES, MOST_PLACES, MOST_IDS, MOST_ELEMENTS = 1 << 8, 1 << 24, 1 << 32, 1 << 34

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
        kernels=lambda o: 3 if is_cast(o) else 1,
        plain_bytes=lambda o: sum(x.bytes for x in (*o.inputs[:2], *o.outputs)) + 2 * cast_factors(o),
        workspace=cast_factors,
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
        workspace=fused_attention,
    ),
    "cross_attention": OpSpec(
        "tbhk,sbchk,bs->tbhk,bht",
        whole="sck",
        statistics=(1,),
        law="attention",
        flops=count(tsbhk=4),
        kernels=count(12),
        plain_bytes=sized(count(tbhk=2, sbhk=3), count(tsbh=9, tbhk=4, sbhk=7, tbh=1), own=count(bs=3)),
        workspace=fused_attention,
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
        workspace=lambda o: fused_attention(o) + o.inputs[4].bytes,  # the log-sum-exp in the kernel's layout
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
        workspace=lambda o: fused_attention(o) + o.inputs[4].bytes,
    ),
    # o and log-sum-exp over parts of the keys, one pair after the other -> over all keys
    "merge_attention": OpSpec(
        None,
        statistics=(1,),
        flops=times(pair_count, count(tbhk=2, tbh=6), count(tbh=-4)),
        kernels=times(pair_count, count(7), count(4)),
        plain_bytes=times(
            pair_count,
            sized(count(tbhk=3), count(tbhk=4, tbh=10), own=count(tbh=2)),
            sized(count(tbhk=1), count(tbhk=2, tbh=2), own=count(tbh=2)),
        ),
        workspace=sized(count(tbhk=1), count(tbh=2), own=count(tbh=1), cast=count(tbhk=2)),
    ),
    # addends of one shape -> their sum, of bf16 in fp32
    "sum_parts": OpSpec(
        None,
        flops=times(input_count, out, lambda o: -out(o)),
        kernels=times(input_count, count(1), count(1)),
        plain_bytes=times(input_count, sized(out, own=lambda o: 8 * out(o)), sized(out)),
        workspace=lambda o: 4 * out(o) if o.outputs[0].dtype == "bfloat16" else 0,
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
    # x, scale, shift -> (x - mean) / std * (1 + scale) + shift, mean, 1 / std
    "modulate_layer_norm": OpSpec(
        "tbd,bd,bd->tbd,tb,tb",
        whole="d",
        statistics=(1, 2),
        flops=count(tbd=7, tb=6, bd=1),
        kernels=count(14),
        plain_bytes=sized(count(tbd=2, bd=2), count(tbd=12, tb=12, bd=4)),
        workspace=sized(count(bd=1), wide=count(tbd=1), cast=count(tbd=1)),
    ),
    # dy, x, mean, rstd, scale -> dx (+ residual gradient), dscale, dshift
    "modulate_layer_norm_backward": OpSpec(
        "tbd,tbd,tb,tb,bd->tbd,bd,bd",
        linear=((0,),),
        whole="d",
        adds=True,
        backward=True,
        flops=count(tbd=13, tb=2, bd=1),
        kernels=count(17),
        plain_bytes=sized(count(tbd=3, bd=1), count(tbd=26, tb=7, bd=6)),
        workspace=sized(wide=count(tbd=3, tb=1), cast=count(tbd=1)),
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
    # of the hidden values of a feed-forward part without a gate
    "activate": OpSpec("tbf->tbf", flops=count(tbf=3)),
    "activate_backward": OpSpec("tbf,tbf->tbf", linear=((0,),), backward=True, flops=count(tbf=8)),
    # modulation shared by the layers + this layer's table, e.g. "drb,rd->rbd"
    "add_table": OpSpec(None, flops=out),
    # sum or permute: "rbd->rd"
    "sum_to": OpSpec(
        None,
        linear=((0,),),
        adds=True,
        flops=lambda o: o.inputs[0].elements if is_sum(o) else 0,
        kernels=lambda o: 2 if is_sum(o) else 1,
        plain_bytes=lambda o: o.inputs[0].bytes + (3 if is_sum(o) else 1) * o.outputs[0].bytes,
        workspace=lambda o: o.outputs[0].bytes if is_sum(o) else 0,
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
        kernels=times(draw_count, count(148), count(23)),
        plain_bytes=times(
            draw_count, count(32, b=64, p=8), sized(count(tbp=1), own=count(tbp=2488, tp=109, t=176, p=224))
        ),
        workspace=lambda o: count(t=32, p=48)(o) + drawn_rows(o) * count(bp=104, p=16)(o),
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
    # -- v-prediction with zero terminal SNR --------------------------------------------------------------------
    # t = 1 - n / steps, n uniform in 1 ... steps
    "draw_step": OpSpec(
        "b,b,n->b", flops=count(b=4), kernels=count(143), plain_bytes=count(32, b=2578), workspace=count(b=104)
    ),
    # x1, x0, t -> x_t = alpha x1 + sigma x0, v = alpha x0 - sigma x1; a table of ``steps`` levels is made anew
    "diffuse": OpSpec(
        "tbp,tbp,b->tbp,tbp",
        flops=lambda o: 7 * o.attrs["steps"] + doubled(o) + count(2, tbp=6, b=6)(o),
        kernels=lambda o: 29 + 2 * doublings(o),
        plain_bytes=lambda o: (
            120 * o.attrs["steps"] + 40 * doubled(o) + sized(count(tbp=1), count(tbp=15, b=7), count(64, b=176))(o)
        ),
        workspace=lambda o: 32 * o.attrs["steps"] + sized(wide=count(tbp=2, b=2), own=count(b=8))(o),
        counted=("steps",),
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
    "scale": OpSpec(None, linear=((0,),), flops=out),  # times ``factor``
    "accumulate": OpSpec(None, linear=((0,),), adds=True),  # addend, total: total += addend
    # alignment gaps and tail padding of a flat gradient
    "zero_gaps": OpSpec(
        None,
        linear=((0,),),
        in_place={0: 0},
        fresh=True,
        bytes=gap_bytes,
        kernels=lambda o: len(o.attrs["gaps"]),
        counted=("gaps",),
    ),
    "sum_of_squares": OpSpec(
        "rn->",
        flops=times(flat_chunks, count(1), count(n=2)),
        kernels=times(flat_chunks, count(2), count(1)),
        plain_bytes=sized(times(flat_chunks, count(4), count(1, n=1))),
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
    "mark": OpSpec("n->n"),  # its number -> where a watchdog looks: 8 bytes, over the bus where a GPU runs it
    # master, m, v, ema, gradient, clip factor, finite?, counters, lr -> master, m, v, ema. Counted for a shard that
    # decays whole, or not at all: where that changes within it, one chunk more is begun
    "adamw": OpSpec(
        "rn,rn,rn,rn,rn,,,q,->rn,rn,rn,rn",
        in_place={0: 0, 1: 1, 2: 2, 3: 3},
        flops=count(19, n=18),
        kernels=times(flat_chunks, count(13), count(23)),
        plain_bytes=sized(times(flat_chunks, count(8), count(47, n=31)), own=times(flat_chunks, count(1), count(25))),
        workspace=lambda o: sized(count(9))(o) + 2 * o.item_bytes[0] * min(FLAT_CHUNK, o.sizes["n"]),
    ),
}
LEAVE_SMS = tuple(op for op, spec in OPS.items() if spec.leaves_sms)


def signature_of(kind: str, attrs: Mapping[str, Any]) -> Signature:
    text = OPS[kind].signature or attrs["signature"]
    return parse(text)
