"""Context parallel: self-attention with tokens split over cp, K and V (only) gathered (torch-free).

    kv [T, B, 2, H, K], one buffer so that K and V travel in one collective and cannot be gathered in different orders
    forward    kvg = all_gather_cp(kv)                 o, lse = attention(q, kvg)         q stays local
    backward   dq, dkvg = attention_backward(...)      dkv = reduce_scatter_cp(dkvg)       dkvg is Partial over cp

Movie Gen 3.1.6: softmax attention depends on the sequence only through its keys and values.

[Note: head slices] With ``plan.kv_slices`` = n > 1 a rank's H heads are taken in n parts, each with a collective of its
own: K and V lie slice-major, [slice][T][B][K,V][H/n][K], q, o and their gradients are read and written by strides. The
next slice is gathered while attention runs on this one (the prefetch of ring-flash-attention's
``llama3_flash_attn_varlen``, zhuzilin and others); backward does the same and reduces dK and dV of one slice while
the next is computed. At most two gathered slices are alive: ``schedule.py`` gathers a third once the first was read.

[Note: token chunks] With ``plan.kv_chunks`` = n > 1 K and V travel in n parts of every rank's tokens instead. All heads
attend to one chunk of the keys after the other, so that waves of blocks stay as full as in one piece, and the parts are
merged by their log-sum-exp (Milakov and Gimelshein 2018, arXiv 1805.02867, section 3.1; as between the steps of Ring
Attention, arXiv 2310.01889). Backward of a part reads the merged o and log-sum-exp: softmax weights against all keys
follow from them, so dK and dV of a chunk are whole, and dq is the sum over the chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.builder import Builder
from ..ir.layout import TOKENS_GATHERED, Placement
from ..ir.program import Buffer


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


def _chunks(b: Builder, x: Buffer, suffix: str = "") -> list[Buffer]:
    count, name = b.plan.kv_chunks, x.name.rpartition("/")[2]
    return [b.part(x, f"{name}.c{i}{suffix}", 0, i, count) for i in range(count)]


def split(b: Builder, kv: Buffer) -> list[Buffer]:
    """K and V [T, B, 2, H, K] in the parts that travel by themselves."""
    if b.plan.kv_chunks > 1:
        return _chunks(b, kv)
    if b.plan.kv_slices == 1:
        return [kv]
    return [
        b.op("copy", [part], f"kv_slice.h{i}", signature="tbchk->tbchk")[0]
        for i, part in enumerate(_head_slices(b, kv, 3))
    ]


def attention(b: Builder, q: Buffer, kv_parts: list[Buffer]) -> Attention:
    """``kv_parts`` as :func:`split` made them."""
    stat = b.plan.stat_dtype
    if b.plan.kv_chunks > 1:
        return _attention_by_chunks(b, q, kv_parts)
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


def _attention_by_chunks(b: Builder, q: Buffer, kv_parts: list[Buffer]) -> Attention:
    dtypes = (q.dtype, b.plan.stat_dtype)
    slices: list[tuple[Buffer, Buffer, Buffer, Buffer]] = []
    for i, part in enumerate(kv_parts):
        gathered = b.all_gather(part, TOKENS_GATHERED, f"kv_gathered.c{i}")
        o_part, lse_part = b.op("attention", [q, gathered], (f"o_of.c{i}", f"lse_of.c{i}"), dtypes=dtypes)
        slices.append((q, gathered, o_part, lse_part))
    parts = [buffer for _, _, o_part, lse_part in slices for buffer in (o_part, lse_part)]
    signature = ",".join(["tbhk,bht"] * len(slices)) + "->tbhk,bht"
    o, lse = b.op("merge_attention", parts, ("o", "lse"), dtypes=dtypes, signature=signature)
    return Attention(o, lse, kv_parts, slices)


def _backward_by_chunks(b: Builder, do: Buffer, layer: Attention) -> tuple[Buffer, list[Buffer]]:
    merge, kv = b.producers(layer.o), b.buffers[layer.kv_parts[0].base or ""]
    dkv = b.buffer("dkv", kv.shape, do.dtype, kv.placement)
    count = len(layer.slices)
    # The gradient of a part as backward wants it: that of the whole, since the merged log-sum-exp scales it.
    dos = b.pass_through(do, merge, {f"do.c{i}": 2 * i for i in range(count)})
    dqs: list[Buffer] = []
    for i, (place, (q, gathered, o_part, _)) in enumerate(zip(_chunks(b, dkv, ".issued"), layer.slices, strict=True)):
        dq, dgathered = b.op(
            "attention_backward",
            [dos[i], q, gathered, layer.o, layer.lse],
            (f"dq_of.c{i}", f"dkv_gathered.c{i}"),
            of=b.producer(o_part),
            gradient=dos[i],
            wrt={0: 0, 1: 1},
        )
        dqs.append(dq)
        b.reduce_scatter(dgathered, TOKENS_GATHERED, f"dkv.c{i}", of=b.producer(gathered), into=place)
    signature = ",".join(["tbhk"] * count) + "->tbhk"
    return b.op("sum_parts", dqs, "dq", signature=signature)[0], [dkv]


def attention_backward(b: Builder, do: Buffer, layer: Attention) -> tuple[Buffer, list[Buffer]]:
    """Returns dq and dK and dV of this rank's own tokens: of each head slice, else whole."""
    if b.plan.kv_chunks > 1:
        return _backward_by_chunks(b, do, layer)
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
