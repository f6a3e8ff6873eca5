"""RMSNorm with adaLN scale and shift in Triton, alone or with the position embedding added in front.

    x0 = x + position            (position_modulate_norm only; rounded to the stream's dtype, as it is stored)
    r  = 1 / sqrt(mean(x0^2) + eps)           h = x0 r gain (1 + scale) + shift
    backward, n = x0 r, slope = gain (1 + scale), g = dy slope:
    dx (+)= r (g - n mean(g n))      dshift = sum_t dy      p = sum_t dy n      dscale = gain p
    dgain = sum_b (1 + scale) p
    (Zhang and Sennrich 2019; adaLN: Peebles and Xie 2023)

Shapes   x, x0, h, dy, dx [T, B, D]; position [T, D]; gain [D]; scale, shift, dscale, dshift [B, D]; r [T, B] fp32.
Bytes    least, for e bytes an element: forward 2e T B D (with the position 3e T B D + e T D), backward 3e T B D, 4e
         when it adds onto the residual's gradient; a vector or two of D besides.
Tiling   a mean over D needs a whole row before its first output, so a program owns whole rows, and keeps each in
         registers: one pass. 16 warps hold 8,192 columns as 16 floats a thread; of 128 registers the backward then
         fills 16 each for slope, the two sums, and the row's dy, n and dx. One such program a multiprocessor walks the
         tokens of its slice with the loads of the next rows under way in shared memory (the loop is pipelined:
         3 stages * 3 rows * 12 kB).
         slope, shift and the sums are read and written once a slice, not once a row. A slice has 72 tokens or more
         where that leaves 64 programs: 16 bytes of partial sums (written and read) and 4 of vectors a column are then
         below 5 % of 6 * 72. There are 128 slices at most, which the second stage loads at once; they divide 73,728
         tokens, and the four multiprocessors that they leave idle add nothing to what the memory delivers.

Deterministic: a slice adds its tokens in order, and the second stage adds the slices in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check
from .device import scratch, table_of
from .spec import Sizes, Spec
from .tiles import ITEM_BYTES, MULTIPROCESSORS, Launch, cover, norm_slices, power_of_two, row_warps
from .tuning import DEFAULT_DEVICE, shape_class, tile

STREAM = (torch.bfloat16, torch.float32)
STATISTICS = (torch.float32,)
STAGES = 3
COLUMNS = 64  # of the second stage: 96 programs at D = 6,144
PARTIALS = 128  # slices that it adds at once: all of them, with one wait for memory


@triton.jit
def forward_kernel(
    x: tl.tensor,
    position: tl.tensor,
    gain: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    x0: tl.tensor,
    h: tl.tensor,
    rstd: tl.tensor,
    tokens: int,
    batch: int,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    POSITION: tl.constexpr,
) -> None:
    """One slice of one sample's tokens. Without ``POSITION``, ``position`` and ``x0`` are not touched."""
    sample = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    vector = sample * WIDTH + column
    slope = 1.0 + tl.load(scale + vector, mask=inside, other=0.0).to(tl.float32)
    slope *= tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + vector, mask=inside, other=0.0).to(tl.float32)
    zero = tl.zeros((), tl.int64)
    for token in tl.range(tl.program_id(0), tokens, SLICES, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        row = sample + token * batch
        at = row * WIDTH + column
        wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if POSITION:
            wide += tl.load(position + (zero + token) * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
            stored = wide.to(x0.dtype.element_ty)  # pyright: ignore[reportAttributeAccessIssue]
            tl.store(x0 + at, stored, mask=inside)
            wide = stored.to(tl.float32)
        r = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(wide * wide, 0) / WIDTH + EPS))
        tl.store(rstd + row, r)
        tl.store(h + at, wide * r * slope + offset, mask=inside)


@triton.jit
def backward_kernel(
    dy: tl.tensor,
    x: tl.tensor,
    rstd: tl.tensor,
    gain: tl.tensor,
    scale: tl.tensor,
    dx: tl.tensor,
    shift_sums: tl.tensor,
    product_sums: tl.tensor,
    tokens: int,
    batch: int,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    """One slice of one sample's tokens: dx, and this slice's sums of dy and of dy * n, [slice, B, D]."""
    sample = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    slope = 1.0 + tl.load(scale + sample * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    slope *= tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    shift_sum = tl.zeros((BLOCK,), tl.float32)
    product_sum = tl.zeros((BLOCK,), tl.float32)
    for token in tl.range(tl.program_id(0), tokens, SLICES, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        row = sample + token * batch
        at = row * WIDTH + column
        r = tl.load(rstd + row)
        normed = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * r
        gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        product = gradient * normed
        shift_sum += gradient
        product_sum += product
        mean = tl.sum(product * slope, 0) / WIDTH
        result = (gradient * slope - normed * mean) * r
        if ADD:
            result += tl.load(dx + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, result, mask=inside)
    partial = (tl.program_id(0) * tl.num_programs(1) + sample) * WIDTH + column
    tl.store(shift_sums + partial, shift_sum, mask=inside)
    tl.store(product_sums + partial, product_sum, mask=inside)


@triton.jit
def vectors_kernel(
    shift_sums: tl.tensor,
    product_sums: tl.tensor,
    gain: tl.tensor,
    scale: tl.tensor,
    dgain: tl.tensor,
    dscale: tl.tensor,
    dshift: tl.tensor,
    batch: int,
    WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
) -> None:
    """The second stage: every sample's dscale and dshift, and dgain, for a block of columns."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    part = tl.arange(0, PARTIALS)
    wide_gain = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    gain_sum = tl.zeros((BLOCK,), tl.float32)
    for sample in range(0, batch):
        shift_parts = tl.zeros((PARTIALS, BLOCK), tl.float32)
        product_parts = tl.zeros((PARTIALS, BLOCK), tl.float32)
        for first in range(0, SLICES, PARTIALS):
            which = (first + part).to(tl.int64)
            mask = (which < SLICES)[:, None] & inside[None, :]
            at = (which[:, None] * batch + sample) * WIDTH + column[None, :]
            shift_parts += tl.load(shift_sums + at, mask=mask, other=0.0)
            product_parts += tl.load(product_sums + at, mask=mask, other=0.0)
        product = tl.sum(product_parts, 0)
        vector = sample * WIDTH + column
        slope = 1.0 + tl.load(scale + vector, mask=inside, other=0.0).to(tl.float32)
        tl.store(dshift + vector, tl.sum(shift_parts, 0), mask=inside)
        tl.store(dscale + vector, wide_gain * product, mask=inside)
        gain_sum += slope * product
    tl.store(dgain + column, gain_sum, mask=inside)


# -- launchers --------------------------------------------------------------------------------------------------------


def _rows_launch(
    kernel: str, tokens: int, batch: int, width: int, count: int, device: str, **constexprs: float | bool
) -> Launch:
    block = power_of_two(width)
    default = {"STAGES": STAGES, "num_warps": row_warps(block)}
    best = tile(f"modulate_norm.{kernel}", shape_class(T=tokens * batch, D=width), default, device)
    sizes = {"WIDTH": width, "BLOCK": block, "SLICES": count, "STAGES": best["STAGES"]}
    return Launch((count, batch), {**constexprs, **sizes}, num_warps=best["num_warps"], num_stages=best["STAGES"])


def _forward_launch(
    tokens: int, batch: int, width: int, eps: float, position: bool, device: str = DEFAULT_DEVICE
) -> Launch:
    count = max(1, min(MULTIPROCESSORS // batch, tokens))
    kernel = "position_forward" if position else "forward"
    return _rows_launch(kernel, tokens, batch, width, count, device, EPS=eps, POSITION=position)


def _backward_launch(tokens: int, batch: int, width: int, add: bool, device: str = DEFAULT_DEVICE) -> Launch:
    return _rows_launch("backward", tokens, batch, width, norm_slices(tokens, batch), device, ADD=add)


def _vectors_launch(tokens: int, batch: int, width: int) -> Launch:
    sizes = {"SLICES": norm_slices(tokens, batch), "BLOCK": COLUMNS, "PARTIALS": PARTIALS}
    return Launch((cover(width, COLUMNS),), {"WIDTH": width, **sizes})


def modulate_norm(inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, eps: float) -> None:
    """x, gain, scale, shift -> h, r; CUDA or interpreted. Raises CinemeshError for a tensor that it cannot take."""
    x, gain, scale, shift = inputs
    h, rstd = outputs
    tensors = {"x": x, "gain": gain, "scale": scale, "shift": shift, "h": h}
    sizes = _check("modulate_norm", tensors, {"rstd": rstd})
    launch = _forward_launch(sizes["t"], sizes["b"], sizes["d"], eps, False, table_of(x))
    launch.run(forward_kernel, x, x, gain, scale, shift, h, h, rstd, sizes["t"], sizes["b"])


def position_modulate_norm(inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, eps: float) -> None:
    """x, position, gain, scale, shift -> x0, h, r; as :func:`modulate_norm`."""
    x, position, gain, scale, shift = inputs
    x0, h, rstd = outputs
    tensors = {"x": x, "position": position, "gain": gain, "scale": scale, "shift": shift, "x0": x0, "h": h}
    sizes = _check("position_modulate_norm", tensors, {"rstd": rstd})
    launch = _forward_launch(sizes["t"], sizes["b"], sizes["d"], eps, True, table_of(x))
    launch.run(forward_kernel, x, position, gain, scale, shift, x0, h, rstd, sizes["t"], sizes["b"])


def modulate_norm_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, add: bool = False) -> None:
    """dy, x, r, gain, scale -> dx, dgain, dscale, dshift (fp32); as :func:`modulate_norm`."""
    dy, x, rstd, gain, scale = inputs[:5]
    dx, dgain, dscale, dshift = outputs
    tensors = {"dy": dy, "x": x, "gain": gain, "scale": scale, "dx": dx}
    sizes = _check(
        "modulate_norm_backward", tensors, {"rstd": rstd, "dgain": dgain, "dscale": dscale, "dshift": dshift}
    )
    tokens, batch, width = sizes["t"], sizes["b"], sizes["d"]
    sums = scratch(x, 2, norm_slices(tokens, batch), batch, width)
    launch = _backward_launch(tokens, batch, width, add, table_of(x))
    launch.run(backward_kernel, dy, x, rstd, gain, scale, dx, sums[0], sums[1], tokens, batch)
    launch = _vectors_launch(tokens, batch, width)
    launch.run(vectors_kernel, sums[0], sums[1], gain, scale, dgain, dscale, dshift, batch)


LABELS = {
    **dict.fromkeys(("x", "h", "x0", "dy", "dx"), "tbd"),
    **dict.fromkeys(("scale", "shift", "dscale", "dshift"), "bd"),
    **dict.fromkeys(("gain", "dgain"), "d"),
    "position": "td",
    "rstd": "tb",
}


def _check(op: str, stream: dict[str, Tensor], statistics: dict[str, Tensor]) -> dict[str, int]:
    tensors = {name: (tensor, LABELS[name], STREAM) for name, tensor in stream.items()}
    tensors |= {name: (tensor, LABELS[name], STATISTICS) for name, tensor in statistics.items()}
    return check(op, tensors, unaligned=("rstd",))


# -- the compile check ------------------------------------------------------------------------------------------------


def compile_specs(sizes: Sizes) -> list[Spec]:
    """Forward, forward with the position, backward onto the residual's gradient, and its second stage."""
    t, b, d, kind = sizes.local_tokens, sizes.batch, sizes.width, sizes.dtype
    extents = {"t": t, "b": b, "d": d}
    shape = {"T": t, "B": b, "D": d}
    item = ITEM_BYTES[kind]
    stream, vectors = item * t * b * d, item * (1 + 2 * b) * d
    count = norm_slices(t, b)
    parts = ("fp32", (count, b, d))

    def tensors(*names: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        fp32 = ("rstd", "dgain", "dscale", "dshift")
        return {
            name: ("fp32" if name in fp32 else kind, tuple(extents[label] for label in LABELS[name])) for name in names
        }

    def forward(name: str, position: bool, least_bytes: int) -> Spec:
        arguments = tensors("x", "position", "gain", "scale", "shift", "x0", "h", "rstd")
        return _forward_launch(t, b, d, 1e-5, position).spec(
            name, forward_kernel, arguments, {"tokens": ("i32", t), "batch": ("i32", b)}, shape, least_bytes
        )

    sums = {"shift_sums": parts, "product_sums": parts}
    return [
        forward("modulate_norm.forward", False, 2 * stream + vectors + 4 * t * b),
        forward("modulate_norm.position_forward", True, 3 * stream + item * t * d + vectors + 4 * t * b),
        _backward_launch(t, b, d, True).spec(
            "modulate_norm.backward",
            backward_kernel,
            {**tensors("dy", "x", "rstd", "gain", "scale", "dx"), **sums},
            {"tokens": ("i32", t), "batch": ("i32", b)},
            shape,
            4 * stream + item * (1 + b) * d + 4 * t * b,
        ),
        _vectors_launch(t, b, d).spec(
            "modulate_norm.vectors",
            vectors_kernel,
            {**sums, **tensors("gain", "scale", "dgain", "dscale", "dshift")},
            {"batch": ("i32", b)},
            {**shape, "S": count},
            8 * count * b * d + item * (1 + b) * d + 4 * (1 + 2 * b) * d,
        ),
    ]
