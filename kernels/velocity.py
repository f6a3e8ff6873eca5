"""Flow matching in Triton: the interpolated sample with its target, the loss and the loss's gradient.

    x_t = t x1 + (1 - (1 - sigma_min) t) x0        target = x1 - (1 - sigma_min) x0         (Movie Gen 3.1.2)
    loss (+)= sum (v - target)^2 / n               dv = 2 (v - target) / n
    n = elements of the batch * micro-batches

Shapes   all [T, B, P] but t [B] and the loss, a scalar. x1, x0, target, t, loss fp32; x_t, v, dv in the stream's dtype.
Bytes    least, for each of T B P elements and e bytes of the stream's dtype: interpolation 12 + e, loss 4 + e, gradient
         4 + 2e.
Tiling   elements are alone. Interpolation takes 64 tokens of one sample, so that t is one number; the others take 4,096
         elements of the flat tensors. The loss's programs walk on by their number, at most 1,024 of them, each to one
         partial sum; one more program adds those.

Deterministic: a program adds its elements in one order, and the second stage adds the partial sums in one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check
from .device import scratch
from .partial_sums import sum_slices, sum_spec
from .spec import Sizes, Spec
from .tiles import ITEM_BYTES, SUM_BLOCK, Launch, cover, flat_sums, power_of_two

STREAM = (torch.bfloat16, torch.float32)
STATISTICS = (torch.float32,)
BLOCK = 4096
TOKENS = 64


@triton.jit
def interpolate_kernel(
    x1: tl.tensor,
    x0: tl.tensor,
    t: tl.tensor,
    x_t: tl.tensor,
    target: tl.tensor,
    tokens: int,
    batch: int,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    KEPT: tl.constexpr,
) -> None:
    """``TOKENS`` tokens of one sample. ``KEPT`` = 1 - sigma_min."""
    sample = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    value = tl.arange(0, BLOCK)
    at = (token * batch + sample)[:, None] * VALUES + value[None, :]
    mask = (token < tokens)[:, None] & (value < VALUES)[None, :]
    time = tl.load(t + sample)
    data = tl.load(x1 + at, mask=mask, other=0.0)
    noise = tl.load(x0 + at, mask=mask, other=0.0)
    tl.store(x_t + at, time * data + (1.0 - KEPT * time) * noise, mask=mask)
    tl.store(target + at, data - KEPT * noise, mask=mask)


@triton.jit
def loss_kernel(
    velocity: tl.tensor, target: tl.tensor, sums: tl.tensor, elements: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """This program's sum of squared errors."""
    total = tl.zeros((BLOCK,), tl.float32)
    blocks = (elements - 1) // BLOCK + 1  # tl.cdiv adds first, which wraps just below 2**31
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        at = tl.zeros((), tl.int64) + block
        at = at * BLOCK + tl.arange(0, BLOCK)
        mask = at < elements
        error = tl.load(velocity + at, mask=mask, other=0.0).to(tl.float32) - tl.load(target + at, mask=mask, other=0.0)
        total += error * error
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def gradient_kernel(
    velocity: tl.tensor,
    target: tl.tensor,
    gradient: tl.tensor,
    elements: tl.tensor,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """``BLOCK`` elements of the flat tensors. ``FACTOR`` = 2 / n."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    error = tl.load(velocity + at, mask=mask, other=0.0).to(tl.float32) - tl.load(target + at, mask=mask, other=0.0)
    tl.store(gradient + at, error * FACTOR, mask=mask)


# -- launchers --------------------------------------------------------------------------------------------------------


def _interpolate_launch(tokens: int, batch: int, values: int, sigma_min: float) -> Launch:
    tile = {"VALUES": values, "BLOCK": power_of_two(values), "TOKENS": TOKENS, "KEPT": 1.0 - sigma_min}
    return Launch((cover(tokens, TOKENS), batch), tile, num_warps=8)


def _loss_launch(elements: int) -> Launch:
    return Launch((flat_sums(elements),), {"BLOCK": SUM_BLOCK}, num_warps=8)


def _gradient_launch(elements: int, factor: float) -> Launch:
    return Launch((cover(elements, BLOCK),), {"FACTOR": factor, "BLOCK": BLOCK}, num_warps=8)


def interpolate(inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, sigma_min: float) -> None:
    """x1, x0, t -> x_t, target; CUDA or interpreted. Raises CinemeshError for a tensor that it cannot take."""
    x1, x0, t = inputs
    x_t, target = outputs
    tensors = {"x1": x1, "x0": x0, "target": target}
    sizes = check(
        "interpolate",
        {name: (x, "tbp", STATISTICS) for name, x in tensors.items()}
        | {"x_t": (x_t, "tbp", STREAM), "t": (t, "b", STATISTICS)},
        unaligned=("t",),
    )
    launch = _interpolate_launch(sizes["t"], sizes["b"], sizes["p"], sigma_min)
    launch.run(interpolate_kernel, x1, x0, t, x_t, target, sizes["t"], sizes["b"])


def velocity_loss(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, elements: int, micro_batches: int, add: bool = False
) -> None:
    """velocity, target -> loss; as :func:`interpolate`."""
    velocity, target = inputs[:2]
    (loss,) = outputs
    check(
        "velocity_loss",
        {"velocity": (velocity, "tbp", STREAM), "target": (target, "tbp", STATISTICS), "loss": (loss, "", STATISTICS)},
        unaligned=("loss",),
    )
    launch = _loss_launch(target.numel())
    sums = scratch(target, launch.grid[0])
    launch.run(loss_kernel, velocity, target, sums, target.numel())
    sum_slices(sums, loss, alpha=1.0 / (elements * micro_batches), add=add)


def velocity_loss_backward(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, elements: int, micro_batches: int
) -> None:
    """velocity, target -> gradient; as :func:`interpolate`."""
    velocity, target = inputs
    (gradient,) = outputs
    check(
        "velocity_loss_backward",
        {
            "velocity": (velocity, "tbp", STREAM),
            "target": (target, "tbp", STATISTICS),
            "gradient": (gradient, "tbp", STREAM),
        },
    )
    launch = _gradient_launch(target.numel(), 2.0 / (elements * micro_batches))
    launch.run(gradient_kernel, velocity, target, gradient, target.numel())


# -- the compile check ------------------------------------------------------------------------------------------------


def compile_specs(sizes: Sizes) -> list[Spec]:
    """Interpolation, loss with its second stage, gradient."""
    t, b, kind = sizes.local_tokens, sizes.batch, sizes.dtype
    kt, kh, kw = sizes.patch
    p = sizes.latent[0] * kt * kh * kw
    elements, item, shape = t * b * p, ITEM_BYTES[kind], {"T": t, "B": b, "P": p}
    wide, stream, count = ("fp32", (t, b, p)), (kind, (t, b, p)), {"elements": ("i32", elements)}
    loss = _loss_launch(elements)
    return [
        _interpolate_launch(t, b, p, 1e-5).spec(
            "velocity.interpolate",
            interpolate_kernel,
            {"x1": wide, "x0": wide, "t": ("fp32", (b,)), "x_t": stream, "target": wide},
            {"tokens": ("i32", t), "batch": ("i32", b)},
            shape,
            (12 + item) * elements + 4 * b,
        ),
        loss.spec(
            "velocity.loss",
            loss_kernel,
            {"velocity": stream, "target": wide, "sums": ("fp32", loss.grid)},
            count,
            shape,
            (4 + item) * elements + 4,
        ),
        sum_spec("velocity.loss_sum", loss.grid[0], 1),
        _gradient_launch(elements, 2.0 / elements).spec(
            "velocity.gradient",
            gradient_kernel,
            {"velocity": stream, "target": wide, "gradient": stream},
            count,
            shape,
            (4 + 2 * item) * elements,
        ),
    ]
