"""Compute: what each op of a program costs on one GPU, from its local shape (torch-free).

matmul      small tiles of the output run in waves over the SMs; each costs its FLOPs and a prologue. The library picks
            among larger tiles and may split k, which shortens the last wave: only ``tail`` of what it leaves idle is
            paid. Never faster than its bytes from memory. Residual of the law by shape: a small measured grid.
attention   blocks of rows of one head run in waves over the SMs and walk all keys; by family of kernels and head dim:
            that of the kernel which the catalogue chooses for the cluster's chip and software.
others      bytes over the achieved part of the memory's rate. An op that has no kernel of its own runs in its plain
            form: the kernels, and the bytes that they move, are columns of the op table.
Products and self-attention run on the SMs that ``plan.sm_margin`` leaves them: as fast a wave, more waves.
All run at the clock that a long step sustains under the power limit: ``gpu.sustained``, fitted, apart from the laws,
which hold for short isolated kernels (``clock="isolated"``).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from ...errors import CinemeshError
from ...kernels.catalogue import Implementation, candidates
from ...kernels.counts import DTYPE_BYTES, Operands
from ...kernels.ops import LEAVE_SMS, OPS
from ...kernels.selection import PLAIN_INSTALL, Software, select
from ...kernels.tuning import device_key
from ...parallel.ir.plan import Plan
from ...parallel.ir.program import Program
from ...parallel.ir.records import Op
from ..clusters.cluster import Cluster
from ..clusters.constants import YamlTable

Bound = Literal["compute", "memory", "launch"]
Direction = Literal["forward", "backward"]

ITEM_BYTES = {**DTYPE_BYTES, "float16": 2, "float8": 1}
# FLOPs of attention for each query, key and head element, by whether it is a backward.
_PER_ELEMENT = {
    OPS[op].backward: OPS[op].flops(Operands(dict.fromkeys("tsbhk", 1), (), (), {}, False))
    for op in ("attention", "attention_backward")
}


def unfused_ops(device: str, software: Software = PLAIN_INSTALL) -> frozenset[str]:
    """Memory-bound ops that run in their plain form on ``device`` (kernels/catalogue.py)."""
    memory_bound = (op for op, spec in OPS.items() if not spec.is_product)
    return frozenset(op for op in memory_bound if select(op, device, software).entry.rate_class != "memory.fused")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One attention kernel: ``heads`` query heads of ``batch`` samples, ``queries`` against ``keys`` tokens each."""

    direction: Direction
    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    dtype: str
    causal: bool = False
    dropout: bool = False


@dataclass(frozen=True, slots=True)
class OpPrice:
    """``kernel_s`` on the device, ``host_s`` to launch it, and what sets the pace."""

    kernel_s: float
    host_s: float
    bound: Bound

    @property
    def seconds(self) -> float:
        return max(self.kernel_s, self.host_s)


class Compute:
    """Prices the ops of one cluster's GPU, on the kernels that its software has.

    ``mode``: how kernels are launched; None: as the cluster's steps are. ``unfused``: ops that run in their plain form;
    None: as the catalogue tells.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        mode: Literal["eager", "graph"] | None = None,
        unfused: Collection[str] | None = None,
        clock: Literal["sustained", "isolated"] = "sustained",
    ) -> None:
        self.cluster = cluster
        graph = cluster.captured if mode is None else mode == "graph"
        self.launch_s = cluster.launch.graph_s if graph else cluster.launch.eager_s
        self.unfused = unfused_ops(cluster.gpu.device, cluster.software) if unfused is None else unfused
        self.clock = clock
        self._grid = cluster.grid(cluster.matmul.grid)
        self._on_gpus = cluster.device == "cuda"
        self._prices: dict[object, OpPrice] = {}
        self._kernels: dict[tuple[str, str | None, int | None], Implementation] = {}
        self._card = device_key(cluster.gpu.name)

    def kernel(self, op: str, dtype: str | None = None, head_dim: int | None = None) -> Implementation:
        """What the catalogue chooses to run an attention op, on the cluster's chip with its software.

        Raises CinemeshError for an override that cannot be met.
        """
        if (op, dtype, head_dim) not in self._kernels:
            sizes = None if head_dim is None else {"k": head_dim}
            gpu, software = self.cluster.gpu.device, self.cluster.software
            chosen = select(op, gpu, software, dtype=dtype, sizes=sizes, tuned=self._card).entry
            self._kernels[op, dtype, head_dim] = chosen
        return self._kernels[op, dtype, head_dim]

    # -- ops ----------------------------------------------------------------------------------------------------------

    def op_s(self, program: Program, op: Op) -> float:
        """Seconds of one compute op on one rank: its kernels, or the host where launching them takes longer."""
        return self.price(program, op).seconds

    def bound(self, program: Program, op: Op) -> Bound:
        """What sets the op's pace."""
        return self.price(program, op).bound

    def price(self, program: Program, op: Op) -> OpPrice:
        """Price of a compute op, kept by kind, local shapes and dtypes."""
        margin = self.margin(program, op)
        key = (program.alike(op), margin)
        found = self._prices.get(key)
        if found is None:
            found = self._prices[key] = self._price(program, op, margin)
        return found

    def check(self, plan: Plan) -> None:
        """Raises CinemeshError for a plan that leaves compute no SM, or asks of attention what its kernels cannot."""
        gpu = self.cluster.gpu
        if not self._on_gpus:
            return
        plan.check_device(gpu.name, gpu.sms)
        for op in LEAVE_SMS if plan.sm_margin else ():
            if OPS[op].law == "attention" and not (chosen := self.kernel(op)).margin:
                able = ", ".join(entry.package for entry in candidates(op) if entry.margin)
                raise CinemeshError(
                    f"plan: sm_margin({plan.sm_margin}): {op} on {self.cluster.name} is priced as {chosen.package} "
                    f"({chosen.why}), which takes every SM",
                    remedy=f"only {able} leaves some. Set sm_margin to 0, or state --packages {able}",
                )

    def margin(self, program: Program, op: Op) -> int:
        """SMs that an op leaves to communication."""
        return self.left_sms(program.plan) if op.kind in LEAVE_SMS else 0

    def left_sms(self, plan: Plan) -> int:
        """SMs that products and self-attention leave under a plan: none where there is no NCCL to take them."""
        return plan.sm_margin if self._on_gpus else 0

    def _price(self, program: Program, op: Op, margin: int) -> OpPrice:
        dtype = program.buffers[op.inputs[0]].dtype
        spec = OPS[op.kind]
        if spec.law == "matmul":
            return self.product(program, op, dtype, margin)
        if spec.law == "attention":
            z = program.label_sizes(op)
            call = AttentionCall(
                direction="backward" if spec.backward else "forward",
                batch=z["b"],
                queries=z["t"],
                keys=z["s"],
                heads=z["h"],
                head_dim=z["k"],
                dtype=dtype,
            )
            entry = self.kernel(op.kind, dtype, call.head_dim)
            ordered = self.cluster.software.deterministic and entry.ordered == "asked"
            work, memory, floor = self._attention(call, entry.rate_class, margin, ordered)
            return self._priced(work, memory, floor, 1)
        measured = self.cluster.measured
        if measured is not None and op.kind in measured.bytes_per_s:
            memory = program.bytes_moved(op) / measured.bytes_per_s[op.kind]
            return self._priced(0.0, memory, measured.floor_s[op.kind], 0)
        kernels, moved = 1, program.bytes_moved(op)
        if op.kind in self.unfused:
            operands = program.operands(op)
            kernels, moved = spec.kernels(operands), spec.plain_bytes_of(operands)
        stream = self.cluster.stream
        memory = moved / (self.cluster.gpu.memory_bytes_per_s * stream.fraction)
        return self._priced(0.0, memory, kernels * stream.floor_s, kernels)

    def product(self, program: Program, op: Op, dtype: str, margin: int) -> OpPrice:
        """Of a matmul whose factors are of a dtype; its result is as the program has it. ``margin``: SMs left alone."""
        signature = program.label_signature(op)
        batch, m, n, k = matmul_shape(signature.inputs, signature.outputs[0], program.label_sizes(op))
        accumulate = len(op.inputs) > len(signature.inputs)
        out = program.buffers[op.outputs[0]].dtype
        work, memory, floor = self._matmul(
            m, n, k, dtype, out_dtype=out, accumulate=accumulate, batch=batch, margin=margin
        )
        return self._priced(work, memory, floor, 1)

    def _priced(self, work: float, memory: float, floor: float, kernels: int) -> OpPrice:
        kernel, host = max(work, memory) + floor, kernels * self.launch_s
        if max(work, memory) < max(floor, host):
            return OpPrice(kernel, host, "launch")
        return OpPrice(kernel, host, "compute" if work >= memory else "memory")

    # -- laws ---------------------------------------------------------------------------------------------------------

    def matmul_s(
        self,
        m: int,
        n: int,
        k: int,
        dtype: str,
        *,
        out_dtype: str | None = None,
        accumulate: bool = False,
        batch: int = 1,
        margin: int = 0,
    ) -> float:
        """[m, k] x [k, n], ``batch`` times; ``accumulate`` reads the output too. On the device, without launch.

        ``margin``: SMs left alone.
        """
        work, memory, floor = self._matmul(
            m, n, k, dtype, out_dtype=out_dtype, accumulate=accumulate, batch=batch, margin=margin
        )
        return max(work, memory) + floor

    def attention_s(self, call: AttentionCall, family: str, *, margin: int = 0) -> float:
        """An attention kernel of a family on the device, without launch. ``margin``: SMs left alone.

        ``unfused`` is the one family that every cluster has: products with the scores in memory, a softmax kernel and,
        with ``dropout``, one more kernel over the scores.
        """
        work, memory, floor = self._attention(call, family, margin)
        return max(work, memory) + floor

    def stream_s(self, bytes_moved: float) -> float:
        """A memory-bound kernel that reads and writes ``bytes_moved`` in all."""
        stream = self.cluster.stream
        return bytes_moved / (self.cluster.gpu.memory_bytes_per_s * stream.fraction) + stream.floor_s

    def _speed(self, dtype: str) -> tuple[float, float]:
        """Peak FLOP/s of a dtype and the part of the clock that is sustained."""
        gpu = self.cluster.gpu
        if any(dtype not in t for t in (gpu.peak_flops, gpu.sustained, self.cluster.matmul.efficiency)):
            known = ", ".join(gpu.peak_flops)
            raise CinemeshError(
                f"cluster {self.cluster.name}: {gpu.name} has no {dtype} rate",
                remedy=f"use one of {known} or add it to the file",
            )
        return gpu.peak_flops[dtype], gpu.sustained[dtype] if self.clock == "sustained" else 1.0

    def _matmul(
        self,
        m: int,
        n: int,
        k: int,
        dtype: str,
        *,
        out_dtype: str | None,
        accumulate: bool,
        batch: int,
        margin: int,
    ) -> tuple[float, float, float]:
        """(work, memory, floor) seconds."""
        gpu, law = self.cluster.gpu, self.cluster.matmul
        speed, sustained = self._speed(dtype)
        tile_s = 2.0 * law.tile * law.tile * k * gpu.sms / (speed * law.efficiency[dtype]) + law.prologue_s
        work = _waves(batch * -(-m // law.tile) * -(-n // law.tile) / (gpu.sms - margin), law.tail) * tile_s
        if self._grid is not None:
            work *= self._grid.at(m, n, k)
        moved = (m * k + k * n) * ITEM_BYTES[dtype] + m * n * ITEM_BYTES[out_dtype or dtype] * (1 + accumulate)
        memory = batch * moved / (gpu.memory_bytes_per_s * law.memory_fraction)
        return work / sustained, memory, law.floor_s

    def _attention(
        self, call: AttentionCall, family: str, margin: int, ordered: bool = False
    ) -> tuple[float, float, float]:
        """(work, memory, floor) seconds. ``ordered``: a backward that is asked to sum in one fixed order."""
        if family == "unfused":
            return self._unfused(call)
        if family not in self.cluster.attention:
            known = ", ".join((*self.cluster.attention, "unfused"))
            raise CinemeshError(
                f"cluster {self.cluster.name}: no attention kernels {family!r} among {known}",
                remedy="add their constants to its file, or inherit them: base: [sm_90]",
            )
        kernels, forward = self.cluster.attention[family], call.direction == "forward"
        law = kernels.forward if forward else kernels.backward
        sms = self.cluster.gpu.sms
        padded, speed = _head(law.speed, call.head_dim)
        if ordered and not forward:
            speed *= kernels.ordered
        # Forward blocks are rows of queries that walk the keys, backward blocks rows of keys that walk the queries.
        own, walked = (call.queries, call.keys) if forward else (call.keys, call.queries)
        if call.causal:
            walked = min(walked, (walked + law.rows) / 2)
        per_element = _PER_ELEMENT[not forward]
        _, sustained = self._speed(call.dtype)
        block = per_element * law.rows * walked * padded * sms / speed / sustained + law.prologue_s
        heads = call.batch * call.heads
        work = _waves(heads * math.ceil(own / law.rows) / (sms - margin), law.tail) * block
        tensors = 2 if forward else 4  # q and o; with gradients of both. k and v alike
        moved = tensors * heads * (call.queries + call.keys) * call.head_dim * ITEM_BYTES[call.dtype]
        memory = moved / (self.cluster.gpu.memory_bytes_per_s * self.cluster.stream.fraction)
        return work, memory, law.floor_s

    def _unfused(self, call: AttentionCall) -> tuple[float, float, float]:
        """Scores in memory: products as batched matmuls, softmax and dropout as passes over the scores."""
        batch, queries, keys, head_dim = call.batch * call.heads, call.queries, call.keys, call.head_dim
        scores, dropout = batch * queries * keys * ITEM_BYTES[call.dtype], call.dropout
        kernels = 1 + dropout
        if call.direction == "forward":
            products = [(queries, keys, head_dim), (queries, head_dim, keys)]
            passes = 2 + 2.5 * dropout  # read and write; dropout also writes its mask, a byte each
        else:
            products = [
                (keys, head_dim, queries),
                (queries, keys, head_dim),
                (queries, head_dim, keys),
                (keys, head_dim, queries),
            ]
            passes = 3 + 2.5 * dropout  # read the probabilities and their gradient, write
        matmuls = sum(self.matmul_s(m, n, k, call.dtype, batch=batch) for m, n, k in products)
        softmax = self.stream_s(passes * scores) + (kernels - 1) * self.cluster.stream.floor_s
        return 0.0, matmuls + softmax, 0.0


def _waves(full: float, tail: float) -> float:
    """Time in blocks: at least one; ``tail`` of the idle part of the last wave is paid."""
    return max(1.0, full + tail * (math.ceil(full) - full))


def _head(speed: YamlTable, head_dim: int) -> tuple[int, float]:
    """The smallest head dim with a kernel that holds ``head_dim``, and its speed; beyond the largest, its speed."""
    dims = sorted((int(name), value) for name, value in speed.items())
    for dim, value in dims:
        if head_dim <= dim:
            return dim, value
    return head_dim, dims[-1][1]


def matmul_shape(inputs: tuple[str, ...], output: str, sizes: dict[str, int]) -> tuple[int, int, int, int]:
    """(batch, m, n, k) of an einsum: labels of both factors that stay, of the first, of the second, summed ones."""
    a, b = inputs[0], inputs[1]

    def extent(keep: bool, labels: str, other: str) -> int:
        return math.prod(sizes[x] for x in labels if (x in other) == keep and x in output)

    batch = extent(True, a, b)
    summed = math.prod(sizes[x] for x in a if x not in output)
    return batch, extent(False, a, b), extent(False, b, a), summed
