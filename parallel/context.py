"""Context parallel: self-attention with tokens split over cp, K and V (only) gathered (torch-free).

    kv [T, B, 2, H, K], one buffer so that K and V travel in one collective and cannot be gathered in different orders
    forward    kvg = all_gather_cp(kv)                 o, lse = attention(q, kvg)         q stays local
    backward   dq, dkvg = attention_backward(...)      dkv = reduce_scatter_cp(dkvg)       dkvg is Partial over cp

Movie Gen 3.1.6: softmax attention depends on the sequence only through its keys and values.
"""

from __future__ import annotations

from .builder import Builder
from .layout import TOKENS_GATHERED
from .program import Buffer


def attention(b: Builder, q: Buffer, kv: Buffer, prefix: str = "") -> tuple[Buffer, Buffer, Buffer]:
    """Returns (o [T, B, H, K], gathered K and V, log-sum-exp [B, H, T])."""
    kvg = b.all_gather(kv, TOKENS_GATHERED, f"{prefix}kv_gathered")
    o, lse = b.op("attention", [q, kvg], (f"{prefix}o", f"{prefix}lse"), dtypes=(q.dtype, b.plan.stat_dtype))
    return o, kvg, lse


def attention_backward(
    b: Builder, do: Buffer, q: Buffer, kvg: Buffer, o: Buffer, lse: Buffer, prefix: str = ""
) -> tuple[Buffer, Buffer]:
    """Returns (dq, dkv) of this rank's own tokens."""
    dq, dkvg = b.op(
        "attention_backward",
        [do, q, kvg, o, lse],
        (f"{prefix}dq", f"{prefix}dkv_gathered"),
        of=b.producer(o),
        gradient=do,
        wrt={0: 0, 1: 1},
    )
    dkv = b.reduce_scatter(dkvg, TOKENS_GATHERED, f"{prefix}dkv", of=b.producer(kvg))
    return dq, dkv
