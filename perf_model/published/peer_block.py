"""The blocks, ends and optimizer of a peer's step as records (torch-free).

Bytes of memory-bound work are counted kernel by kernel: what a fused kernel reads and writes once, an unfused stack
moves again for every eager op. Which records a block has follows Korthikanti et al. 2022 (section 4) and, for Llama
blocks, the eager decompositions of PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable

from ..clusters.cluster import Cluster
from ..prices.compute import AttentionCall, Compute, Direction
from ..prices.network import Network
from .peers import FLOAT, HALF, Recorder, Run

Site = tuple[float, int]  # bytes an element, kernels
Pair = tuple[Site, Site]  # fused, unfused

# An unfused RMSNorm works in fp32: cast, square, mean, scale, cast, gain, and the same again in backward.
RMS_NORM: dict[Direction, Pair] = {"forward": ((4, 1), (34, 6)), "backward": ((6, 1), (78, 11))}
LAYER_NORM: dict[Direction, Site] = {"forward": (4, 1), "backward": (10, 2)}  # gain and bias: a second kernel
ROPE: Pair = ((4, 1), (20, 5))  # unfused: to fp32, complex product, back
GATED: dict[Direction, Pair] = {"forward": ((6, 1), (10, 2)), "backward": ((10, 1), (18, 4))}
PLAIN: dict[Direction, Site] = {"forward": (4, 1), "backward": (6, 1)}
RESIDUAL: Site = (6, 1)
DROPOUT: dict[Direction, Pair] = {"forward": ((1, 0), (5, 1)), "backward": ((5, 1), (5, 1))}  # a mask of one byte
ATTENTION_KERNELS = (2, 4)  # launched for one attention, fused and not
# A step of a ring, an element of its part of the output (or of dq): slices copied, cast to fp32, rescaled, added. From
# MagiAttention's rings beside its all-to-all, which differ by as much a step whatever the sequence or the mask
MERGE: dict[Direction, Site] = {"forward": (40, 7), "backward": (56, 10)}
LOSS: dict[Direction, Pair] = {"forward": ((4, 1), (22, 4)), "backward": ((4, 1), (18, 3))}
METRIC: Site = (14, 3)  # of a logit: cast to fp32, log-softmax; the loss of each token
OPTIMIZER: Pair = ((30, 1), (60, 12))  # a parameter: p, m, v read and written, gradient read, copy written
CLIP: Site = (12, 2)  # a gradient: read for its norm, read and written to be scaled
# An operand of an fp8 product: read, written as it is and transposed; scaled by row, each form is read for its maxima.
# A compiler fuses the cast into what made the operand: then it is only written.
FP8_CAST: dict[str, Pair] = {"tensor": ((2, 0), (4, 1)), "row": ((4, 1), (10, 2))}


class Blocks:
    """Emits the records of one run into one tape; ``peer_step`` calls them in the order of its schedule."""

    def __init__(self, run: Run, compute: Compute, network: Network, cluster: Cluster) -> None:
        self.run, self.stack, self.m = run, run.stack, run.model
        self.r = Recorder(run, compute, network, cluster)
        m = run.model
        self.t = run.tokens
        self.t_local = run.tokens // run.tp if run.sp else run.tokens
        self.width, self.ffn = m.width, m.ffn // run.tp
        self.heads, self.kv = m.heads // run.tp, max(m.kv_heads // run.tp, 1)
        self.qkv_columns = (self.heads + 2 * self.kv) * m.head_dim
        self.o_rows = self.heads * m.head_dim
        self.overlap = run.tp_overlap or self.stack.tp_overlap
        self.qkv_parts = 1 if "qkv" in self.stack.fused else 3
        self.in_parts = 2 if m.gated and "gate_up" not in self.stack.fused else 1
        self.in_columns = (2 if m.gated else 1) * self.ffn
        self.fp8_wire = bool(run.fp8) and run.sp and "tp_cast" in self.stack.fused  # cast first, then gathered over tp

    # -- memory-bound sites -------------------------------------------------------------------------------------

    def _stream(self, site: Site, elements: float) -> None:
        self.r.stream(site[0] * elements, site[1])

    def _site(self, name: str, pair: Pair, elements: float) -> None:
        self._stream(pair[name not in self.stack.fused], elements)

    def _cast(self, elements: float) -> None:
        if self.run.fp8:
            self._site("cast", FP8_CAST[self.run.fp8], elements)

    def _cast_weight(self, elements: float) -> None:
        """A weight that was gathered in half precision and is scaled by row is cast at every use."""
        if self.run.fp8 == "row":
            self._site("cast", FP8_CAST["row"], elements)

    def norm(self, direction: Direction) -> None:
        elements = self.t_local * self.width
        if self.m.gated:
            self._site("norm", RMS_NORM[direction], elements)
        else:
            self._stream(LAYER_NORM[direction], elements)

    def residual(self, direction: Direction) -> None:
        elements = self.t_local * self.width
        self._stream(RESIDUAL, elements)
        if self.m.dropout:
            self._site("residual", DROPOUT[direction], elements)

    def rope(self) -> None:
        if self.m.gated:
            self._site("rope", ROPE, self.t * (self.heads + self.kv) * self.m.head_dim)
        if self.stack.repeat_kv and self.m.kv_heads < self.m.heads:
            self.r.stream(2 * 2 * HALF * self.t * self.o_rows, 2)

    def activation(self, direction: Direction) -> None:
        if self.m.gated:
            self._site("activation", GATED[direction], self.t * self.ffn)
        else:
            self._stream(PLAIN[direction], self.t * self.ffn)

    # -- products -----------------------------------------------------------------------------------------------

    def linear(self, columns: int, rows: int, parts: int = 1, *, after_norm: bool = False) -> None:
        """x [t, rows] times W [rows, columns], in ``parts`` products. An fp8 norm may write what they read."""
        if not (after_norm and "norm_cast" in self.stack.fused):
            self._cast(self.t_local * rows if after_norm and self.fp8_wire else self.t * rows)
        self._cast_weight(columns * rows)
        for _ in range(parts):
            self.r.matmul(self.t, columns // parts, rows, fp8=bool(self.run.fp8))

    def dgrad(self, columns: int, rows: int, parts: int = 1) -> None:
        self._cast(self.t * columns)
        self._cast_weight(columns * rows)
        for _ in range(parts):
            self.r.matmul(self.t, rows, columns // parts, fp8=bool(self.run.fp8))
        if parts > 1:
            self.r.stream(3 * HALF * self.t * rows * (parts - 1), parts - 1)

    def wgrad(self, columns: int, rows: int, parts: int = 1) -> None:
        accumulate = self.stack.shard in ("zero1", "ddp")
        for _ in range(parts):
            self.r.matmul(rows, columns // parts, self.t, fp8=bool(self.run.fp8), accumulate=accumulate)

    def _tp(self, kind: str, product: Callable[[], None], hidden: bool) -> None:
        """A tp collective of the activations [t, d] and a product that it feeds, follows, or may run beside."""
        if self.run.tp == 1:
            product()
            return
        payload = self.t * self.width * (1 if self.fp8_wire and kind == "all_gather" else HALF)
        if hidden and self.overlap == "pipelined":
            self.r.wait(self.r.issue(kind, payload / self.run.tp, "tp"))
            index = self.r.issue(kind, payload * (self.run.tp - 1) / self.run.tp, "tp")
        else:
            index = self.r.issue(kind, payload, "tp")
            if not hidden or self.overlap == "none":
                self.r.wait(index)
                index = -1
        product()
        self.r.wait(index)

    def column(self, columns: int, rows: int, parts: int) -> None:
        """Forward of a column-parallel linear: gathered over tp first, with sp."""
        if self.run.sp:
            product = lambda: self.linear(columns, rows, parts, after_norm=True)  # noqa: E731
            self._tp("all_gather", product, self.overlap == "pipelined")
        else:
            self.linear(columns, rows, parts, after_norm=True)

    def row(self, columns: int, rows: int) -> None:
        kind = "reduce_scatter" if self.run.sp else "all_reduce"
        self._tp(kind, lambda: self.linear(columns, rows), self.run.sp and self.overlap == "pipelined")

    def row_backward(self, columns: int, rows: int) -> None:
        if self.run.sp:
            self._tp("all_gather", lambda: self.dgrad(columns, rows), self.overlap == "pipelined")
        else:
            self.dgrad(columns, rows)
        self.wgrad(columns, rows)

    def column_backward(self, columns: int, rows: int, parts: int) -> None:
        if self.run.sp and self.overlap != "none":  # the input was kept split: gathered again for the weight gradient
            self._tp("all_gather", lambda: self.dgrad(columns, rows, parts), True)
        else:
            self.dgrad(columns, rows, parts)
        kind = "reduce_scatter" if self.run.sp else "all_reduce"
        self._tp(kind, lambda: self.wgrad(columns, rows, parts), True)

    # -- attention ----------------------------------------------------------------------------------------------

    def _kernel(self, direction: Direction, queries: int, keys: int, causal: bool, heads: int | None = None) -> None:
        call = AttentionCall(
            direction=direction,
            batch=self.run.samples,
            queries=queries,
            keys=keys,
            heads=heads or self.heads,
            head_dim=self.m.head_dim,
            dtype=self.run.dtype,
            causal=causal,
            dropout=self.m.dropout,
        )
        seconds = self.r.compute.attention_s(call, self.stack.attention)
        self.r.add(seconds, True, ATTENTION_KERNELS[self.stack.attention == "unfused"])

    def core(self, direction: Direction) -> None:
        queries = self.m.seq // self.run.cp
        if self.run.cp == 1:
            self._kernel(direction, queries, queries, self.m.causal)
        elif self.run.cp_method == "all_to_all":
            self._all_to_all(direction)
        elif self.run.cp_method in ("ring", "contiguous_ring"):
            self._ring(direction, queries)
        else:
            self._gathered(direction, queries)

    def _steps(self, direction: Direction, queries: int) -> list[Callable[[], None]]:
        """The partial attentions of one rank.

        A causal sequence is dealt out head and tail (zigzag), so that every step has half the work; in contiguous
        parts, the last rank works at every step and the others wait.
        """
        merged = self.t * self.o_rows
        half = self.m.causal and self.run.cp_method != "contiguous_ring"

        def remote() -> None:
            self._kernel(direction, queries, queries // 2 if half else queries, False)
            self._stream(MERGE[direction], merged)

        own = [lambda: self._kernel(direction, queries, queries, self.m.causal)]
        return own + [remote] * (self.run.cp - 1)

    def _kv_bytes(self) -> float:
        """K and V of the whole sequence."""
        kv = self.heads if self.stack.repeat_kv else self.kv
        return 2 * self.t * self.run.cp * kv * self.m.head_dim * HALF

    def _ring(self, direction: Direction, queries: int) -> None:
        """Every step passes K and V on while it computes; backward passes their gradients too."""
        message = self._kv_bytes() / self.run.cp * (1 if direction == "forward" else 2)
        steps = self._steps(direction, queries)
        for step in steps[:-1]:
            index = self.r.issue("send_recv", message, "cp")
            step()
            self.r.wait(index)
        steps[-1]()

    def _gathered(self, direction: Direction, queries: int) -> None:
        """K and V gathered behind the rank's own part; backward gathers again and sums dK and dV (fp32 when split)."""
        index = self.r.issue("all_gather", self._kv_bytes(), "cp")
        if "keys" in self.stack.fused:  # one kernel over all keys, as TransformerEngine does
            self.r.wait(index)
            half = 2 if self.m.causal else 1
            self._kernel(direction, queries, self.m.seq // half, False)
            if direction == "backward":
                self.r.wait(self.r.issue("reduce_scatter", self._kv_bytes(), "cp"))
            return
        own, *others = self._steps(direction, queries)
        own()
        self.r.wait(index)
        gradients = self._kv_bytes() / self.run.cp * FLOAT / HALF if direction == "backward" else 0.0
        if not self.stack.cp_passes_gradients:
            for step in others:
                step()
            self.r.wait(self.r.issue("reduce_scatter", gradients * self.run.cp, "cp") if gradients else -1)
            return
        passed = self.r.issue("send_recv", gradients, "cp") if gradients else -1
        for step in others:
            step()
            self.r.wait(passed)
            passed = self.r.issue("send_recv", gradients, "cp") if gradients else -1
        self.r.wait(passed)

    def _all_to_all(self, direction: Direction) -> None:
        cp = self.run.cp
        moved = self.t * (2 * self.o_rows + 2 * self.kv * self.m.head_dim) * HALF
        self.r.wait(self.r.issue("all_to_all", moved, "cp"))
        self._kernel(direction, self.m.seq, self.m.seq, self.m.causal, heads=max(self.heads // cp, 1))

    # -- blocks -------------------------------------------------------------------------------------------------

    def block(self, names: frozenset[str] | None = None) -> None:
        """Forward, or with ``names`` the records that run again."""
        for name, emit in (
            ("norm1", lambda: self.norm("forward")),
            ("q", lambda: self.column(self.qkv_columns, self.width, self.qkv_parts)),
            ("kv", lambda: self.linear(self.kv * self.m.head_dim, self.width)),
            ("rope", self.rope),
            ("core", lambda: self.core("forward")),
            ("out", lambda: self.row(self.width, self.o_rows)),
            ("residual1", lambda: self.residual("forward")),
            ("norm2", lambda: self.norm("forward")),
            ("ffn_in", lambda: self.column(self.in_columns, self.width, self.in_parts)),
            ("up", lambda: self.linear(self.ffn, self.width)),
            ("activation", lambda: self.activation("forward")),
            ("ffn_out", lambda: self.row(self.width, self.ffn)),
            ("residual2", lambda: self.residual("forward")),
        ):
            if name in names if names is not None else name not in ("kv", "up"):
                emit()

    def recompute(self) -> None:
        """The records that run again, scaled to the share of blocks that recompute."""
        share = self.run.recomputed_share
        if share >= 1.0:
            self.block(self.run.recomputed)
            return
        whole = Recorder(self.run, self.r.compute, self.r.network, self.r.cluster)
        self.r, kept = whole, self.r
        self.block(self.run.recomputed)
        self.r = kept
        self.r.add(share * whole.play(), True, round(share * whole.kernels))

    def block_backward(self) -> None:
        self.residual("backward")
        self.row_backward(self.width, self.ffn)
        self.activation("backward")
        self.column_backward(self.in_columns, self.width, self.in_parts)
        self.norm("backward")
        self.residual("backward")
        self.row_backward(self.width, self.o_rows)
        self.core("backward")
        self.rope()
        self.column_backward(self.qkv_columns, self.width, self.qkv_parts)
        self.norm("backward")

    # -- ends ---------------------------------------------------------------------------------------------------

    def head(self) -> None:
        """Final norm, vocabulary product (never fp8), loss, and their backward."""
        columns = self.m.vocab // self.run.tp
        self.norm("forward")
        self.r.matmul(self.t, columns, self.width)
        logits = self.t * columns
        if self.stack.whole_vocab and self.run.tp > 1:
            logits = self.t * self.m.vocab
            self.r.wait(self.r.issue("all_gather", logits * HALF, "tp"))
            self.r.stream(2 * HALF * logits)  # put together
        self._site("loss", LOSS["forward"], logits)
        self._site("loss", LOSS["backward"], logits)
        self.r.matmul(self.t, self.width, columns)
        self.r.matmul(self.width, columns, self.t, accumulate=self.stack.shard in ("zero1", "ddp"))
        for _ in range(self.stack.metrics):
            self._stream(METRIC, logits)
        self.norm("backward")
        if self.run.tp > 1:
            self.r.wait(self.r.issue("all_reduce", self.t * self.width * HALF, "tp"))

    def embed(self) -> None:
        self.r.stream(3 * HALF * self.t * self.width, 2)
        if self.run.tp > 1:
            self.r.wait(self.r.issue("all_reduce", self.t * self.width * HALF, "tp"))

    def optimizer(self, layers: int) -> None:
        """Clip and update of this rank's share of the parameters."""
        parameters = (layers * self.m.block_parameters + self.m.end_parameters) / self.run.tp
        own = parameters / (1 if self.stack.shard == "ddp" else self.run.shard)
        self._stream(CLIP, own)
        self._site("optimizer", OPTIMIZER, own)
