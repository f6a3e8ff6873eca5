"""What a record takes, for the passes that must weigh one against another (torch-free).

A cost model may speak (``perf_model``); where none does, ranks that must agree on an order take these round numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...kernels.ops import OPS
from ..ir.collectives import FUSED
from ..ir.program import Program
from ..ir.records import Op
from .fuse_tp import pipelined_s

Price = Callable[[Program, Op], float]


@dataclass(frozen=True)
class Rates:
    """What ranks that must agree on an order take for prices when no cost model speaks. All of one rank, each way.

    ``server_ranks`` neighbouring ranks share a server. A collective takes ``latency_s``, ``hop_s`` more for each
    server, and its wire bytes over the slowest link on its way. A copy to or from the host has its way for itself.
    """

    flops_per_s: float
    memory_bytes_per_s: float
    server_ranks: int
    server_bytes_per_s: float
    link_bytes_per_s: float
    latency_s: float
    hop_s: float
    host_bytes_per_s: float

    def price(self, program: Program, op: Op) -> float:
        """Seconds of a record: FLOPs or bytes, whichever takes longer; a wait is free."""
        if op.kind in OPS:
            flops, moved, _ = program.counts(op)
            return max(flops / self.flops_per_s, moved / self.memory_bytes_per_s)
        if op.is_wait:
            return 0.0
        if op.to is not None:
            return self.latency_s + program.payload_bytes(op) / self.host_bytes_per_s
        if op.kind in FUSED:
            products = sum(self.price(program, part) for part in op.parts if part.kind in OPS)
            return pipelined_s(products, self.price(program, op.collective), program.plan.size(op.axes))
        plan = program.plan
        outermost = max(plan.order.index(axis) for axis in op.axes)
        extent = plan.size(plan.order[: outermost + 1])
        if extent <= self.server_ranks:
            return self.latency_s + program.wire_bytes(op) / self.server_bytes_per_s
        hops = self.hop_s * extent / self.server_ranks
        return self.latency_s + hops + program.wire_bytes(op) / self.link_bytes_per_s


RATES = {
    # NVIDIA's datasheets (H100 SXM: 989 TFLOP/s dense bf16, 3.35 TB/s, NVLink 450 and PCIe 64 GB/s each way; 400 Gb/s a
    # GPU), times what large kernels and messages reach of them
    "nccl": Rates(989e12 * 0.65, 3.35e12 * 0.8, 8, 450e9 * 0.8, 50e9 * 0.8, 20e-6, 5e-6, 64e9 * 0.8),
    # one core of a laptop and gloo over loopback, to an order of magnitude
    "gloo": Rates(20e9, 4e9, 8, 400e6, 50e6, 300e-6, 0.0, 4e9),
}
