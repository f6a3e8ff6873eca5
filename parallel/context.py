"""Context parallel: self-attention with tokens split over cp, K and V (only) gathered (torch-free).

    kv [T, B, 2, H, K], one buffer so that K and V travel in one collective and cannot be gathered in different orders
    forward    kvg = all_gather_cp(kv)                 o, lse = attention(q, kvg)         q stays local
    backward   dq, dkvg = attention_backward(...)      dkv = reduce_scatter_cp(dkvg)       dkvg is Partial over cp

Movie Gen 3.1.6: softmax attention depends on the sequence only through its keys and values.

[Note: head slices] With ``plan.kv_slices`` = n > 1 a rank's H heads are taken in n parts, each with a collective of its
own: K and V lie slice-major, [slice][T][B][K,V][H/n][K], q, o and their gradients are read and written by strides. The
next slice is gathered while attention runs on this one (the prefetch of ring-flash-attention's
``llama3_flash_attn_varlen``, zhuzilin and others); backward does the same and reduces dK and dV of one slice while
the next is computed. At most two gathered slices are alive: ``overlap.py`` gathers a third once the first was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .builder import Builder
from .layout import TOKENS_GATHERED, Placement
from .program import Buffer


@dataclass
class Attention:
    """Forward of self-attention: o [T, B, H, K], log-sum-exp [B, H, T]; of each head slice q, K and V, o and lse."""

    o: Buffer
    lse: Buffer
    kv_parts: list[Buffer]
    slices: list[tuple[Buffer, Buffer, Buffer, Buffer]]


def _head_slices(b: Builder, x: Buffer, dim: int) -> list[Buffer]:
    count, name = b.plan.kv_slices, x.name.rpartition("/")[2]
    return [b.part(x, f"{name}.h{i}", dim, i, count) for i in range(count)]


def split_heads(b: Builder, kv: Buffer) -> list[Buffer]:
    """K and V [T, B, 2, H, K] slice by slice, each to travel by itself."""
    if b.plan.kv_slices == 1:
        return [kv]
    return [
        b.op("copy", [part], f"kv_slice.h{i}", signature="tbchk->tbchk")[0]
        for i, part in enumerate(_head_slices(b, kv, 3))
    ]


def attention(b: Builder, q: Buffer, kv_parts: list[Buffer]) -> Attention:
    """``kv_parts`` as :func:`split_heads` made them."""
    stat = b.plan.stat_dtype
    if len(kv_parts) == 1:
        gathered = b.all_gather(kv_parts[0], TOKENS_GATHERED, "kv_gathered")
        o, lse = b.op("attention", [q, gathered], ("o", "lse"), dtypes=(q.dtype, stat))
        return Attention(o, lse, kv_parts, [(q, gathered, o, lse)])
    tokens, batch, heads = q.placement.dims[:3]
    o = b.buffer("o", q.shape, q.dtype, q.placement)
    lse = b.buffer("lse", (q.shape[1], q.shape[2], q.shape[0]), stat, Placement((batch, heads, tokens)))
    slices: list[tuple[Buffer, Buffer, Buffer, Buffer]] = []
    places = zip(_head_slices(b, q, 2), _head_slices(b, o, 2), _head_slices(b, lse, 1), strict=True)
    for i, (q_part, o_part, lse_part) in enumerate(places):
        gathered = b.all_gather(kv_parts[i], TOKENS_GATHERED, f"kv_gathered.h{i}")
        b.op(
            "attention",
            [q_part, gathered],
            (f"o.h{i}", f"lse.h{i}"),
            dtypes=(q.dtype, stat),
            into={0: o_part, 1: lse_part},
        )
        slices.append((q_part, gathered, o_part, lse_part))
    return Attention(o, lse, kv_parts, slices)


def attention_backward(b: Builder, do: Buffer, layer: Attention) -> tuple[Buffer, list[Buffer]]:
    """Returns dq and, of each head slice, dK and dV of this rank's own tokens."""
    if b.plan.kv_slices == 1:
        q, gathered, o, lse = layer.slices[0]
        dq, dgathered = b.op(
            "attention_backward",
            [do, q, gathered, o, lse],
            ("dq", "dkv_gathered"),
            of=b.producer(o),
            gradient=do,
            wrt={0: 0, 1: 1},
        )
        return dq, [b.reduce_scatter(dgathered, TOKENS_GATHERED, "dkv", of=b.producer(gathered))]
    dq = b.buffer("dq", do.shape, do.dtype, do.placement)
    dkv: list[Buffer] = []
    places = zip(layer.slices, _head_slices(b, do, 2), _head_slices(b, dq, 2), strict=True)
    for i, ((q_part, gathered, o_part, lse_part), do_part, dq_part) in enumerate(places):
        _, dgathered = b.op(
            "attention_backward",
            [do_part, q_part, gathered, o_part, lse_part],
            (f"dq.h{i}", f"dkv_gathered.h{i}"),
            into={0: dq_part},
            of=b.producer(o_part),
            gradient=do_part,
            wrt={0: 0, 1: 1},
        )
        dkv.append(b.reduce_scatter(dgathered, TOKENS_GATHERED, f"dkv_slice.h{i}", of=b.producer(gathered)))
    return dq, dkv


def join_heads(b: Builder, dkv: Sequence[Buffer], kv: Buffer, layer: Attention) -> Buffer:
    """The gradient of ``kv`` [T, B, 2, H, K] from that of its head slices."""
    if len(dkv) == 1:
        return dkv[0]
    whole = b.buffer("dkv", kv.shape, dkv[0].dtype, dkv[0].placement)
    for i, place in enumerate(_head_slices(b, whole, 3)):
        b.op(
            "copy",
            [dkv[i]],
            f"dkv.h{i}",
            signature="tbchk->tbchk",
            into={0: place},
            of=b.producer(layer.kv_parts[i]),
            gradient=dkv[i],
            wrt={0: 0},
        )
    return whole
