"""Context parallel: self-attention with tokens split over cp, K and V (only) gathered (torch-free).

S tokens over R = cp ranks, H heads of one tp rank; local shapes:

    q, o           [S/R, B, H, K]       q stays local
    kv             [S/R, B, 2, H, K]    one buffer: K and V travel in one collective, never in two orders
    kv_gathered    [S, B, 2, H, K]
    lse            [B, H, S/R]

    forward    kv_gathered = all_gather_cp(kv)                  o, lse = attention(q, kv_gathered)
    backward   dq, dkv_gathered = attention_backward(do, q, kv_gathered, o, lse)
               dkv = reduce_scatter_cp(dkv_gathered)            dkv_gathered is Partial over cp

Backward reads ``kv_gathered`` and has no gather of its own: a gathered K and V would cost cp times the memory of the
local one in every block, so unless ``plan.recompute`` keeps it the pass ``passes/recompute.py`` clones forward's gather
in front of backward's first read.

Movie Gen 3.1.6: softmax attention depends on the sequence only through its keys and values.

How K and V travel is one object, made by :func:`split`, with ``forward``, ``backward`` and ``join``:

    Unsplit     one collective
    ByHeads   ``plan.kv_slices`` = n > 1: a rank's H heads in n parts, each with a collective of its own. K and V lie
              slice-major, [slice][T][B][K,V][H/n][K]; q, o and their gradients are read and written by strides. The
              next slice is gathered while attention runs on this one (the prefetch of ring-flash-attention's
              ``llama3_flash_attn_varlen``, zhuzilin and others); backward does the same and reduces dK and dV of one
              slice while the next is computed. At most two gathered slices are alive: ``passes/schedule.py`` gathers a
              third once the first was read.
    ByTokens  ``plan.kv_chunks`` = n > 1: n parts of every rank's tokens. All heads attend to one chunk of the keys
              after the other, so that waves of blocks stay as full as in one piece, and the parts are merged by their
              log-sum-exp (Milakov and Gimelshein 2018, arXiv 1805.02867, section 3.1; as between the steps of Ring
              Attention, arXiv 2310.01889). Backward of a part reads the merged o and log-sum-exp: softmax weights
              against all keys follow from them, so dK and dV of a chunk are whole, and dq is the sum over the chunks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from ..ir.builder import Builder
from ..ir.layout import TOKENS_GATHERED, Placement
from ..ir.records import Buffer, Slice, SliceOf


class KVSplit(ABC):
    """Self-attention over the K and V of all cp ranks, which travel in one of three ways.

    Made from this rank's ``kv`` before q is there: what goes on its way first can hide behind q's product.
    """

    def __init__(self, b: Builder, kv: Buffer) -> None:
        self.b, self.kv = b, kv

    @abstractmethod
    def forward(self, q: Buffer) -> Buffer:
        """o [T, B, H, K] of q [T, B, H, K]."""

    @abstractmethod
    def backward(self, do: Buffer) -> Buffer:
        """Returns dq; dK and dV are on their way until :meth:`join`."""

    @abstractmethod
    def join(self) -> Buffer:
        """The gradient of ``kv``, of this rank's own tokens, after :meth:`backward`."""

    def _attend(
        self, q: Buffer, part: Buffer, names: tuple[str, str], into: Sequence[Buffer], which: Slice | None
    ) -> tuple[Buffer, Buffer, Buffer]:
        """Gather a part of K and V and attend to it: (gathered, o, log-sum-exp)."""
        b = self.b
        gathered = b.all_gather(part, TOKENS_GATHERED, "kv_gathered", part=which)
        dtypes = (q.dtype, b.plan.stat_dtype)
        o, lse = b.op("attention", [q, gathered], names, dtypes=dtypes, into=dict(enumerate(into)), part=which)
        return gathered, o, lse

    def _attend_backward(
        self,
        do: Buffer,
        saved: tuple[Buffer, Buffer, Buffer, Buffer],
        of: Buffer,
        dq: str,
        into: Buffer | None,
        which: Slice | None,
    ) -> tuple[Buffer, Buffer]:
        """Gradients of q and of the gathered part of K and V, from ``saved`` = q, gathered, o, log-sum-exp."""
        dq_part, dgathered = self.b.op(
            "attention_backward",
            [do, *saved],
            (dq, "dkv_gathered"),
            into={0: into} if into else None,
            of=self.b.producer(of),
            gradient=do,
            wrt={0: 0, 1: 1},
            part=which,
        )
        return dq_part, dgathered

    def _reduce(
        self, dgathered: Buffer, gathered: Buffer, name: str, which: Slice | None, into: Buffer | None = None
    ) -> Buffer:
        of = self.b.producer(gathered)
        return self.b.reduce_scatter(dgathered, TOKENS_GATHERED, name, of=of, into=into, part=which)


class Unsplit(KVSplit):
    """All of K and V in one collective."""

    def forward(self, q: Buffer) -> Buffer:
        self.q = q
        self.gathered, self.o, self.lse = self._attend(q, self.kv, ("o", "lse"), (), None)
        return self.o

    def backward(self, do: Buffer) -> Buffer:
        saved = (self.q, self.gathered, self.o, self.lse)
        dq, dgathered = self._attend_backward(do, saved, self.o, "dq", None, None)
        self.dkv = self._reduce(dgathered, self.gathered, "dkv", None)
        return dq

    def join(self) -> Buffer:
        return self.dkv


class ByHeads(KVSplit):
    """A slice of the heads after the other."""

    def __init__(self, b: Builder, kv: Buffer) -> None:
        super().__init__(b, kv)
        self.slices = [Slice(SliceOf.HEADS, i) for i in range(b.plan.kv_slices)]
        self.kv_parts = [
            b.op("copy", [part], "kv_slice", signature="tbchk->tbchk", part=which, role=kv.role)[0]
            for which, part in zip(self.slices, self._parts(kv, 3), strict=True)
        ]

    def _parts(self, x: Buffer, dim: int) -> list[Buffer]:
        return [self.b.part(x, x.role, dim, which, len(self.slices)) for which in self.slices]

    def forward(self, q: Buffer) -> Buffer:
        b = self.b
        tokens, batch, heads = q.placement.dims[:3]
        self.o = b.buffer("o", q.shape, q.dtype, q.placement)
        lse_shape, lse_placement = (q.shape[1], q.shape[2], q.shape[0]), Placement((batch, heads, tokens))
        self.lse = b.buffer("lse", lse_shape, b.plan.stat_dtype, lse_placement)
        places = zip(self._parts(q, 2), self._parts(self.o, 2), self._parts(self.lse, 1), strict=True)
        self.saved: list[tuple[Buffer, Buffer, Buffer, Buffer]] = []
        for which, part, (q_part, o_part, lse_part) in zip(self.slices, self.kv_parts, places, strict=True):
            gathered, o, lse = self._attend(q_part, part, ("o", "lse"), (o_part, lse_part), which)
            self.saved.append((q_part, gathered, o, lse))
        return self.o

    def backward(self, do: Buffer) -> Buffer:
        dq = self.b.buffer("dq", do.shape, do.dtype, do.placement)
        places = zip(self._parts(do, 2), self._parts(dq, 2), strict=True)
        self.dkv_parts: list[Buffer] = []
        for which, saved, (do_part, dq_part) in zip(self.slices, self.saved, places, strict=True):
            _, dgathered = self._attend_backward(do_part, saved, saved[2], "dq", dq_part, which)
            self.dkv_parts.append(self._reduce(dgathered, saved[1], "dkv_slice", which))
        return dq

    def join(self) -> Buffer:
        b = self.b
        whole = b.buffer("dkv", self.kv.shape, self.dkv_parts[0].dtype, self.dkv_parts[0].placement)
        for which, place, dkv, kv in zip(
            self.slices, self._parts(whole, 3), self.dkv_parts, self.kv_parts, strict=True
        ):
            forward = b.producer(kv)
            facts = {"of": forward, "gradient": dkv, "wrt": {0: 0}, "part": which}
            b.op("copy", [dkv], "dkv", signature="tbchk->tbchk", into={0: place}, **facts)
        return whole


class ByTokens(KVSplit):
    """All heads, one chunk of the keys after the other."""

    def __init__(self, b: Builder, kv: Buffer) -> None:
        super().__init__(b, kv)
        self.slices = [Slice(SliceOf.KEYS, i) for i in range(b.plan.kv_chunks)]
        self.kv_parts = self._parts(kv)

    def _parts(self, x: Buffer, *, issued: bool = False) -> list[Buffer]:
        return [self.b.part(x, x.role, 0, which, len(self.slices), issued=issued) for which in self.slices]

    def forward(self, q: Buffer) -> Buffer:
        b, self.q = self.b, q
        attended = [
            self._attend(q, part, ("o_of", "lse_of"), (), which)
            for which, part in zip(self.slices, self.kv_parts, strict=True)
        ]
        self.gathered, self.o_parts = [one[0] for one in attended], [one[1] for one in attended]
        parts = [buffer for _, o, lse in attended for buffer in (o, lse)]
        signature = ",".join(["tbhk,bht"] * len(self.slices)) + "->tbhk,bht"
        dtypes = (q.dtype, b.plan.stat_dtype)
        self.o, self.lse = b.op("merge_attention", parts, ("o", "lse"), dtypes=dtypes, signature=signature)
        return self.o

    def backward(self, do: Buffer) -> Buffer:
        """dK and dV of a chunk are whole at once; dq is the sum over the chunks."""
        b = self.b
        merge = b.producers(self.o)
        self.dkv = b.buffer("dkv", self.kv.shape, do.dtype, self.kv.placement)
        # The gradient of a part as backward wants it: that of the whole, since the merged log-sum-exp scales it.
        dos = b.pass_through(do, merge, {f"do{which}": 2 * which.index for which in self.slices})
        dqs: list[Buffer] = []
        for which, place in zip(self.slices, self._parts(self.dkv, issued=True), strict=True):
            i = which.index
            saved = (self.q, self.gathered[i], self.o, self.lse)
            dq, dgathered = self._attend_backward(dos[i], saved, self.o_parts[i], "dq_of", None, which)
            dqs.append(dq)
            self._reduce(dgathered, self.gathered[i], "dkv", which, into=place)
        signature = ",".join(["tbhk"] * len(self.slices)) + "->tbhk"
        return b.op("sum_parts", dqs, "dq", signature=signature)[0]

    def join(self) -> Buffer:
        return self.dkv


def split(b: Builder, kv: Buffer) -> KVSplit:
    """How K and V [T, B, 2, H, K] travel under the plan."""
    if b.plan.kv_chunks > 1:
        return ByTokens(b, kv)
    return ByHeads(b, kv) if b.plan.kv_slices > 1 else Unsplit(b, kv)
