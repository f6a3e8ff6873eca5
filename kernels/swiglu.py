"""SwiGLU and its gradients in Triton.

    y = gate s up,  s = sigmoid(gate)         dup = dy gate s         dgate = dy up s (1 + gate (1 - s))
    (Shazeer, "GLU variants improve transformer", 2020)

Shapes   gate, up, y, dy, dgate, dup [T, B, F], read as flat.
Bytes    least, for e bytes an element: forward 3e T B F, backward 5e T B F.
Tiling   elements are alone, so a program takes 4,096 of the flat tensor: 256 threads, each two loads of 16 bytes a
         tensor in bf16, all issued before the first is used. Six such programs on a multiprocessor hold 100 to 150 kB
         of loads in flight, several times what latency asks for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check
from .device import table_of
from .spec import Sizes, Spec
from .tiles import ITEM_BYTES, Launch, cover
from .tuning import DEFAULT_DEVICE, shape_class, tile

STREAM = (torch.bfloat16, torch.float32)
BLOCK = 4096


@triton.jit
def forward_kernel(gate: tl.tensor, up: tl.tensor, y: tl.tensor, elements: tl.tensor, BLOCK: tl.constexpr) -> None:
    """``BLOCK`` elements of the flat tensors."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, g / (1.0 + tl.exp(-g)) * u, mask=mask)


@triton.jit
def backward_kernel(
    dy: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    dgate: tl.tensor,
    dup: tl.tensor,
    elements: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """``BLOCK`` elements of the flat tensors."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    gradient = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    tl.store(dup + at, gradient * g * s, mask=mask)
    slope = s * (1.0 + g * (1.0 - s))
    tl.store(dgate + at, gradient * u * slope, mask=mask)


def _launch(kernel: str, elements: int, device: str = DEFAULT_DEVICE) -> Launch:
    best = tile(f"swiglu.{kernel}", shape_class(N=elements), {"BLOCK": BLOCK, "num_warps": 8}, device)
    return Launch((cover(elements, best["BLOCK"]),), {"BLOCK": best["BLOCK"]}, num_warps=best["num_warps"])


def swiglu(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """gate, up -> y; CUDA or interpreted. Raises CinemeshError for a tensor that it cannot take."""
    gate, up = inputs
    (y,) = outputs
    check("swiglu", {name: (x, "tbf", STREAM) for name, x in {"gate": gate, "up": up, "y": y}.items()})
    launch = _launch("forward", y.numel(), table_of(y))
    launch.run(forward_kernel, gate, up, y, y.numel())


def swiglu_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """dy, gate, up -> dgate, dup; as :func:`swiglu`."""
    dy, gate, up = inputs
    dgate, dup = outputs
    tensors = {"dy": dy, "gate": gate, "up": up, "dgate": dgate, "dup": dup}
    check("swiglu_backward", {name: (x, "tbf", STREAM) for name, x in tensors.items()})
    launch = _launch("backward", dy.numel(), table_of(dy))
    launch.run(backward_kernel, dy, gate, up, dgate, dup, dy.numel())


def compile_specs(sizes: Sizes) -> list[Spec]:
    """Forward and backward."""
    t, b, f = sizes.context_tokens, sizes.batch, sizes.local_ffn
    elements = t * b * f
    shape, count = {"T": t, "B": b, "F": f}, {"elements": ("i32", elements)}

    def spec(name: str, kernel: object, tensors: tuple[str, ...]) -> Spec:
        arguments = dict.fromkeys(tensors, (sizes.dtype, (t, b, f)))
        least_bytes = ITEM_BYTES[sizes.dtype] * len(tensors) * elements
        return _launch(name, elements).spec(f"swiglu.{name}", kernel, arguments, count, shape, least_bytes)

    return [
        spec("forward", forward_kernel, ("gate", "up", "y")),
        spec("backward", backward_kernel, ("dy", "gate", "up", "dgate", "dup")),
    ]
