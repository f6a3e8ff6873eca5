"""LayerNorm of the text projections in Triton.

    y = (x - m) s gain + bias      m = mean(x)      s = 1 / sqrt(mean((x - m)^2) + eps)
    backward, n = (x - m) s, g = dy gain:    dx = s (g - mean(g) - n mean(g n))
    dgain = sum over rows of dy n            dbias = sum over rows of dy                  (Ba, Kiros and Hinton 2016)

Shapes   x, y, dy, dx [L, B, D]; gain, bias, dgain, dbias [D]; m, s [L, B] fp32. dy may be wider than x: the gradients
         of the text are summed over the layers in fp32.
Bytes    least, for e bytes an element: forward 2e L B D, backward (2e + bytes of dy) L B D, vectors of D besides.
Tiling   as the modulated norm: a program owns whole rows, keeps each in registers and walks the rows of its slice, the
         next ones under way. The text is short (868 tokens), so what counts is that the vectors and the partial sums
         (18 bytes a column and program, against 8 a row) stay below 5 %: a slice has at least 48 rows. It takes some
         20 us a step, whatever its tiling.

Deterministic: a slice adds its rows in order, and the second stage adds the slices in order.
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
from .tiles import ITEM_BYTES, Launch, layer_norm_slices, power_of_two, row_warps
from .tuning import DEFAULT_DEVICE, shape_class, tile

STREAM = (torch.bfloat16, torch.float32)
STATISTICS = (torch.float32,)
STAGES = 2


@triton.jit
def forward_kernel(
    x: tl.tensor,
    gain: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    rows: int,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """One slice of the rows."""
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    slope = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    for index in tl.range(tl.program_id(0), rows, SLICES, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        row = tl.zeros((), tl.int64) + index
        at = row * WIDTH + column
        wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.sum(wide, 0) / WIDTH
        centered = tl.where(inside, wide - m, 0.0)
        s = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centered * centered, 0) / WIDTH + EPS))
        tl.store(mean + row, m)
        tl.store(rstd + row, s)
        tl.store(y + at, centered * s * slope + offset, mask=inside)


@triton.jit
def backward_kernel(
    dy: tl.tensor,
    x: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    gain: tl.tensor,
    dx: tl.tensor,
    gain_sums: tl.tensor,
    bias_sums: tl.tensor,
    rows: int,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """One slice of the rows: dx, and this slice's sums of dy * n and of dy."""
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    slope = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    gain_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    for index in tl.range(tl.program_id(0), rows, SLICES, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        row = tl.zeros((), tl.int64) + index
        at = row * WIDTH + column
        m = tl.load(mean + row)
        s = tl.load(rstd + row)
        gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        normed = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - m) * s
        product = gradient * normed
        bias_sum += gradient
        gain_sum += product
        mean_g = tl.sum(gradient * slope, 0) / WIDTH
        mean_gn = tl.sum(product * slope, 0) / WIDTH
        result = (gradient * slope - mean_g - normed * mean_gn) * s
        tl.store(dx + at, result, mask=inside)
    partial = tl.program_id(0) * WIDTH + column
    tl.store(gain_sums + partial, gain_sum, mask=inside)
    tl.store(bias_sums + partial, bias_sum, mask=inside)


# -- launchers --------------------------------------------------------------------------------------------------------


def _launch(kernel: str, rows: int, width: int, device: str = DEFAULT_DEVICE, **constexprs: float) -> Launch:
    block = power_of_two(width)
    count = layer_norm_slices(rows)
    default = {"STAGES": STAGES, "num_warps": row_warps(block)}
    best = tile(f"layer_norm.{kernel}", shape_class(L=rows, D=width), default, device)
    sizes = {"WIDTH": width, "BLOCK": block, "SLICES": count, "STAGES": best["STAGES"]}
    return Launch((count,), {**constexprs, **sizes}, num_warps=best["num_warps"], num_stages=best["STAGES"])


def layer_norm(inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, eps: float) -> None:
    """x, gain, bias -> y, m, s; CUDA or interpreted. Raises CinemeshError for a tensor that it cannot take."""
    x, gain, bias = inputs
    y, mean, rstd = outputs
    sizes = _check("layer_norm", {"x": x, "gain": gain, "bias": bias, "y": y}, {"mean": mean, "rstd": rstd})
    rows = sizes["l"] * sizes["b"]
    launch = _launch("forward", rows, sizes["d"], table_of(x), EPS=eps)
    launch.run(forward_kernel, x, gain, bias, y, mean, rstd, rows)


def layer_norm_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """dy, x, m, s, gain -> dx, dgain, dbias (fp32); as :func:`layer_norm`."""
    dy, x, mean, rstd, gain = inputs
    dx, dgain, dbias = outputs
    statistics = {"mean": mean, "rstd": rstd, "dgain": dgain, "dbias": dbias}
    sizes = _check("layer_norm_backward", {"dy": dy, "x": x, "gain": gain, "dx": dx}, statistics)
    rows, width = sizes["l"] * sizes["b"], sizes["d"]
    launch = _launch("backward", rows, width, table_of(x))
    count = launch.grid[0]
    sums = (dgain, dbias) if count == 1 else scratch(x, 2, count, width)
    launch.run(backward_kernel, dy, x, mean, rstd, gain, dx, sums[0], sums[1], rows)
    if count > 1:
        sum_slices(sums[0], dgain)
        sum_slices(sums[1], dbias)


LABELS = {
    **dict.fromkeys(("x", "y", "dy", "dx"), "lbd"),
    **dict.fromkeys(("gain", "bias", "dgain", "dbias"), "d"),
    **dict.fromkeys(("mean", "rstd"), "lb"),
}


def _check(op: str, stream: dict[str, Tensor], statistics: dict[str, Tensor]) -> dict[str, int]:
    tensors = {name: (tensor, LABELS[name], STREAM) for name, tensor in stream.items()}
    tensors |= {name: (tensor, LABELS[name], STATISTICS) for name, tensor in statistics.items()}
    return check(op, tensors, unaligned=("mean", "rstd"))


# -- the compile check ------------------------------------------------------------------------------------------------


def compile_specs(sizes: Sizes) -> list[Spec]:
    """Forward, backward and second stage, for the longest text encoder."""
    l, b, d, kind = max(sizes.text_tokens), sizes.batch, sizes.width, sizes.dtype  # noqa: E741
    rows, shape, item = l * b, {"L": l, "B": b, "D": d}, ITEM_BYTES[kind]
    stream, vector, row = (kind, (l, b, d)), (kind, (d,)), ("fp32", (l, b))
    launch = _launch("forward", rows, d, EPS=1e-5)
    backward = _launch("backward", rows, d)
    parts = ("fp32", (backward.grid[0], d))
    return [
        launch.spec(
            "layer_norm.forward",
            forward_kernel,
            {"x": stream, "gain": vector, "bias": vector, "y": stream, "mean": row, "rstd": row},
            {"rows": ("i32", rows)},
            shape,
            item * (2 * rows * d + 2 * d) + 8 * rows,
        ),
        backward.spec(
            "layer_norm.backward",
            backward_kernel,
            {"dy": ("fp32", (l, b, d)), "x": stream, "mean": row, "rstd": row, "gain": vector, "dx": stream}
            | {"gain_sums": parts, "bias_sums": parts},
            {"rows": ("i32", rows)},
            shape,
            (2 * item + 4) * rows * d + item * d + 8 * rows + 8 * d,
        ),
        sum_spec("layer_norm.sum", backward.grid[0], d),
    ]
