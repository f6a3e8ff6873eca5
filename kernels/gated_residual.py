"""The gated residual and its gradients in Triton.

    out = x + gate y            dy = dout gate            dgate = sum_t dout y            (dx is dout itself)

Shapes   x, y, out, dout, dy [T, B, D]; gate, dgate [B, D].
Bytes    least, for e bytes an element: forward and backward 3e T B D each, the gate besides.
Tiling   nothing couples the columns, so a program owns 1,024 of them (128 threads of 16 bytes in bf16), keeps the
         gate's part in registers and walks tokens 8 at a time: 8 loads of 16 bytes a thread and tensor at once.
         Forward, a program takes 32 tokens, so the gate is 1 % of its bytes. Backward sums over tokens: the 8 sums stay
         apart until the end, so the loop exchanges nothing between threads. 64 slices of 6 blocks of columns are
         three programs on every multiprocessor, and the partial sums cost 8 * 64 bytes a column: 2 % of the
         6 * 4,608 of the smallest share (TP 8, CP 2).

Deterministic: a program adds its tokens in order, and the second stage adds the slices in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check
from .device import scratch, table_of
from .partial_sums import sum_slices, sum_spec
from .spec import Sizes, Spec
from .tiles import ITEM_BYTES, Launch, cover, gate_slices, power_of_two
from .tuning import DEFAULT_DEVICE, shape_class, tile

STREAM = (torch.bfloat16, torch.float32)
COLUMNS = 1024
TOKENS = 8
TOKENS_A_PROGRAM = 32


@triton.jit
def forward_kernel(
    x: tl.tensor,
    y: tl.tensor,
    gate: tl.tensor,
    out: tl.tensor,
    tokens: int,
    batch: int,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    TOKENS_A_PROGRAM: tl.constexpr,
) -> None:
    """A block of columns of ``TOKENS_A_PROGRAM`` tokens of one sample."""
    sample = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    within = tl.arange(0, TOKENS)
    factor = tl.load(gate + sample * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    for first in range(0, TOKENS_A_PROGRAM, TOKENS):
        token = tl.program_id(0) * TOKENS_A_PROGRAM + first + within
        at = (sample + token * batch)[:, None] * WIDTH + column[None, :]
        mask = (token < tokens)[:, None] & inside[None, :]
        branch = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        stream = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, stream + branch * factor[None, :], mask=mask)


@triton.jit
def backward_kernel(
    dout: tl.tensor,
    y: tl.tensor,
    gate: tl.tensor,
    dy: tl.tensor,
    gate_sums: tl.tensor,
    tokens: int,
    batch: int,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """A block of columns of one slice of one sample's tokens: dy, and this slice's sum of dout * y, [slice, B, D]."""
    slices = tl.num_programs(0)
    sample = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    within = tl.arange(0, TOKENS)
    factor = tl.load(gate + sample * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for first in range(tl.program_id(0) * TOKENS, tokens, slices * TOKENS):
        token = first + within
        at = (sample + token * batch)[:, None] * WIDTH + column[None, :]
        mask = (token < tokens)[:, None] & inside[None, :]
        gradient = tl.load(dout + at, mask=mask, other=0.0).to(tl.float32)
        branch = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        total += gradient * branch
        tl.store(dy + at, gradient * factor[None, :], mask=mask)
    partial = (tl.program_id(0) * tl.num_programs(2) + sample) * WIDTH + column
    tl.store(gate_sums + partial, tl.sum(total, 0), mask=inside)


# -- launchers --------------------------------------------------------------------------------------------------------


def _tile(kernel: str, tokens: int, batch: int, width: int, device: str) -> tuple[dict[str, int], int]:
    """Tile constants, and warps."""
    default = {"BLOCK": COLUMNS, "TOKENS": TOKENS, "num_warps": 4}
    best = tile(f"gated_residual.{kernel}", shape_class(T=tokens * batch, D=width), default, device)
    block = min(best["BLOCK"], power_of_two(width))
    return {"WIDTH": width, "BLOCK": block, "TOKENS": best["TOKENS"]}, best["num_warps"]


def _forward_launch(tokens: int, batch: int, width: int, device: str = DEFAULT_DEVICE) -> Launch:
    sizes, warps = _tile("forward", tokens, batch, width, device)
    grid = (cover(tokens, TOKENS_A_PROGRAM), cover(width, sizes["BLOCK"]), batch)
    return Launch(grid, {**sizes, "TOKENS_A_PROGRAM": TOKENS_A_PROGRAM}, num_warps=warps)


def _backward_launch(tokens: int, batch: int, width: int, device: str = DEFAULT_DEVICE) -> Launch:
    sizes, warps = _tile("backward", tokens, batch, width, device)
    return Launch((gate_slices(tokens), cover(width, sizes["BLOCK"]), batch), sizes, num_warps=warps)


def gated_residual(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """x, y, gate -> out; CUDA or interpreted. Raises CinemeshError for a tensor that it cannot take."""
    x, y, gate = inputs
    (out,) = outputs
    stream = {"x": x, "y": y, "out": out}
    sizes = check(
        "gated_residual",
        {name: (tensor, "tbd", STREAM) for name, tensor in stream.items()} | {"gate": (gate, "bd", STREAM)},
    )
    launch = _forward_launch(sizes["t"], sizes["b"], sizes["d"], table_of(x))
    launch.run(forward_kernel, x, y, gate, out, sizes["t"], sizes["b"])


def gated_residual_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """dout, y, gate -> dy, dgate (fp32); as :func:`gated_residual`."""
    dout, y, gate = inputs
    dy, dgate = outputs
    stream = {"dout": dout, "y": y, "dy": dy}
    sizes = check(
        "gated_residual_backward",
        {name: (tensor, "tbd", STREAM) for name, tensor in stream.items()}
        | {"gate": (gate, "bd", STREAM), "dgate": (dgate, "bd", (torch.float32,))},
    )
    tokens, batch, width = sizes["t"], sizes["b"], sizes["d"]
    launch = _backward_launch(tokens, batch, width, table_of(y))
    sums = scratch(y, launch.grid[0], batch, width)
    launch.run(backward_kernel, dout, y, gate, dy, sums, tokens, batch)
    sum_slices(sums, dgate)


# -- the compile check ------------------------------------------------------------------------------------------------


def compile_specs(sizes: Sizes) -> list[Spec]:
    """Forward, backward and second stage."""
    t, b, d, kind = sizes.local_tokens, sizes.batch, sizes.width, sizes.dtype
    shape, scalars = {"T": t, "B": b, "D": d}, {"tokens": ("i32", t), "batch": ("i32", b)}
    stream, gate = (kind, (t, b, d)), (kind, (b, d))
    least_bytes = ITEM_BYTES[kind] * (3 * t + 1) * b * d
    count = gate_slices(t)
    return [
        _forward_launch(t, b, d).spec(
            "gated_residual.forward",
            forward_kernel,
            {"x": stream, "y": stream, "gate": gate, "out": stream},
            scalars,
            shape,
            least_bytes,
        ),
        _backward_launch(t, b, d).spec(
            "gated_residual.backward",
            backward_kernel,
            {"dout": stream, "y": stream, "gate": gate, "dy": stream, "gate_sums": ("fp32", (count, b, d))},
            scalars,
            shape,
            least_bytes + 4 * b * d,
        ),
        sum_spec("gated_residual.sum", count, b * d),
    ]
