"""Rate classes: what share of its limit an implementation reaches on an H100 (torch-free).

A class is a prediction, good enough to rank implementations and to price one that was never timed; the device's tuning
table replaces it by what was measured there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .tuning import DEFAULT_DEVICE, table

H100_DENSE_BF16_FLOPS_PER_S = 989.4e12  # NVIDIA H100 datasheet, SXM, dense
FA3_PAPER = "arXiv 2407.08608, Figs. 5 and 6: H100 SXM5, fp16, head dim 128, no causal mask, 16k tokens; read off"
ORDERED = 0.85  # what is left of a backward that sums dq in a fixed order; a guess until measured


@dataclass(frozen=True)
class Rate:
    """Shares of ``limit`` reached, forward and backward.

    ``tensor``: model FLOPs over the dense peak of the dtype. ``memory``: the least bytes an op can move over the bytes
    that a copy would move in its time. ``origin``: measured, published, or why this number.
    """

    limit: Literal["tensor", "memory"]
    forward: float
    backward: float
    origin: str

    def share(self, backward: bool) -> float:
        return self.backward if backward else self.forward


def _flops(forward: float, backward: float, origin: str) -> Rate:
    return Rate("tensor", forward / H100_DENSE_BF16_FLOPS_PER_S, backward / H100_DENSE_BF16_FLOPS_PER_S, origin)


RATES: dict[str, Rate] = {
    "matmul": Rate("tensor", 0.75, 0.75, "8192^3 bf16 with cuBLAS on an H100 SXM; usual, the shape decides"),
    "attention.fa2": _flops(370e12, ORDERED * 330e12, FA3_PAPER),
    "attention.fa3": _flops(648e12, ORDERED * 561e12, FA3_PAPER),
    "attention.fa4": _flops(640e12, ORDERED * 550e12, "taken for FlashAttention-3's on Hopper; made for Blackwell"),
    "attention.triton": _flops(450e12, 300e12, "wgmma from Triton, deterministic as written; a guess until measured"),
    "attention.torch": _flops(365e12, ORDERED * 325e12, "FlashAttention-2, and one copy of its outputs"),
    "attention.masked": _flops(200e12, 150e12, "mma.sync kernels of CUTLASS for sm_80; a guess until measured"),
    "attention.reference": Rate("tensor", 0.02, 0.02, "the score matrix goes through memory several times"),
    "attention.cpu": Rate("tensor", 0.5, 0.5, "no GPU: ranks nothing"),
    "memory.fused": Rate("memory", 0.90, 0.90, "target: one pass over memory at 90 % of a copy"),
    "memory.one_pass": Rate("memory", 0.85, 0.85, "one elementwise kernel of torch"),
    "memory.passes": Rate("memory", 0.30, 0.25, "three to four passes over memory, as torch's eager ops make them"),
}


def rate(name: str, device: str = DEFAULT_DEVICE) -> Rate:
    """The rate class ``name``, as measured on ``device`` if its tuning table says so."""
    found = table(device)
    known = RATES[name]
    if name not in found.rates:
        return known
    measured = found.rates[name]
    forward, backward = measured.get("forward", known.forward), measured.get("backward", known.backward)
    return Rate(known.limit, forward, backward, found.origin)
