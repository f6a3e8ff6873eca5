"""AdamW on the flat shard, with the EMA and the bf16 copy, in one pass; and the sum of squares that clips it. Triton.

    g = clip gradient      m += (1 - beta1) (g - m)      v += (1 - beta2) (g^2 - v)
    w = w (1 - lr decay) - lr / (1 - beta1^k) m / (sqrt(v) / sqrt(1 - beta2^k) + eps)
    ema += max(1 - ema_decay, 9 / (10 + k)) (w - ema)
    (Loshchilov and Hutter 2019; k = updates so far, this one counted)

Nothing changes when the norm was not finite. Elements before ``boundary`` decay.

Shapes   master, exp_avg, exp_avg_sq, ema, gradient [1, N] fp32; copy [1, N] bf16, where a fifth output asks for it;
         clip, lr, finite scalars and counters [2] (step, updates), all on the device: nothing is read back to the host.
Bytes    least, an element: 20 read and 16 written, 2 more for the copy; sum of squares 4.
Tiling   elements are alone: a program takes 1,024, two loads of 16 bytes a thread from each of five tensors before the
         first is used. The corrections are one number a program, in fp64: 1 - 0.999^k loses four digits in fp32 at
         k = 1. Sums of squares: 1,024 programs walk on by their number, one partial sum each; one more adds those.

Deterministic: every element has one program, and sums run in one order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check
from .device import scratch, table_of
from .partial_sums import sum_slices, sum_spec
from .reference import decay_boundary
from .spec import Sizes, Spec
from .tiles import SUM_BLOCK, Launch, cover, flat_sums
from .tuning import DEFAULT_DEVICE, shape_class, tile

STATISTICS = (torch.float32,)
BLOCK = 1024


@triton.jit
def adamw_kernel(
    master: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_sq: tl.tensor,
    ema: tl.tensor,
    gradient: tl.tensor,
    copy: tl.tensor,
    clip: tl.tensor,
    finite: tl.tensor,
    counters: tl.tensor,
    learning_rate: tl.tensor,
    elements: tl.tensor,
    boundary: tl.tensor,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    RATE1: tl.constexpr,
    RATE2: tl.constexpr,
    RATE_EMA: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
    COPY: tl.constexpr,
) -> None:
    """``BLOCK`` elements of the flat shard. ``RATE*`` = 1 - decay rate. Without ``COPY``, ``copy`` is not touched."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    w = tl.load(master + at, mask=mask, other=0.0)
    m = tl.load(exp_avg + at, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=mask, other=0.0)
    average = tl.load(ema + at, mask=mask, other=0.0)
    g = tl.load(gradient + at, mask=mask, other=0.0)
    taken = tl.load(finite).to(tl.int1)
    lr = tl.load(learning_rate)
    updates = tl.maximum(tl.load(counters + 1), 1).to(tl.float64)  # 0 only when the first update is skipped
    correction1 = 1.0 - tl.exp(updates * tl.full((), LOG_BETA1, tl.float64))
    correction2 = tl.sqrt(1.0 - tl.exp(updates * tl.full((), LOG_BETA2, tl.float64)))
    step_size = (lr / correction1).to(tl.float32)
    root_correction = (1.0 / correction2).to(tl.float32)
    rate_ema = tl.maximum(9.0 / (10.0 + updates), RATE_EMA).to(tl.float32)  # min(ema_decay, (1 + k) / (10 + k))

    g = g * tl.load(clip)
    m_new = m + RATE1 * (g - m)
    v_new = v + RATE2 * (g * g - v)
    decay = tl.where(at < boundary, lr * WEIGHT_DECAY, 0.0)
    w_new = w * (1.0 - decay) - step_size * (m_new / (tl.sqrt(v_new) * root_correction + EPS))
    w_new = tl.where(taken, w_new, w)
    tl.store(master + at, w_new, mask=mask)
    tl.store(exp_avg + at, tl.where(taken, m_new, m), mask=mask)
    tl.store(exp_avg_sq + at, tl.where(taken, v_new, v), mask=mask)
    tl.store(ema + at, tl.where(taken, average + rate_ema * (w_new - average), average), mask=mask)
    if COPY:
        tl.store(copy + at, w_new, mask=mask)


@triton.jit
def squares_kernel(x: tl.tensor, sums: tl.tensor, elements: tl.tensor, BLOCK: tl.constexpr) -> None:
    """This program's sum of squares."""
    total = tl.zeros((BLOCK,), tl.float32)
    blocks = (elements - 1) // BLOCK + 1  # tl.cdiv adds first, which wraps just below 2**31
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        at = tl.zeros((), tl.int64) + block
        at = at * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < elements, other=0.0)
        total += value * value
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


# -- launchers --------------------------------------------------------------------------------------------------------


def _launch(
    elements: int,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decay: float,
    copy: bool,
    device: str = DEFAULT_DEVICE,
) -> Launch:
    best = tile("adamw.update", shape_class(N=elements), {"BLOCK": BLOCK, "num_warps": 4}, device)
    rates = {"RATE1": 1 - betas[0], "RATE2": 1 - betas[1], "RATE_EMA": 1 - ema_decay}
    logs = {"LOG_BETA1": math.log(betas[0]), "LOG_BETA2": math.log(betas[1])}
    rest = {"EPS": eps, "WEIGHT_DECAY": weight_decay, "BLOCK": best["BLOCK"], "COPY": copy}
    return Launch((cover(elements, best["BLOCK"]),), {**logs, **rates, **rest}, num_warps=best["num_warps"])


def _squares_launch(elements: int) -> Launch:
    return Launch((flat_sums(elements),), {"BLOCK": SUM_BLOCK}, num_warps=8)


def adamw(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decay: float,
    **decay: int,
) -> None:
    """master, m, v, ema, gradient, clip, finite, counters, lr -> master, m, v, ema in place, and [the copy].

    Which elements decay: as in the reference. CUDA or interpreted. Raises CinemeshError for a tensor it cannot take.
    """
    master, exp_avg, exp_avg_sq, ema, gradient, clip, finite, counters, lr = inputs
    flat = {"master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema, "gradient": gradient}
    tensors: dict[str, tuple[Tensor, str, tuple[torch.dtype, ...]]] = {
        name: (x, "rn", STATISTICS) for name, x in flat.items()
    }
    tensors |= {"clip": (clip, "", STATISTICS), "lr": (lr, "", STATISTICS), "finite": (finite, "", (torch.bool,))}
    tensors["counters"] = (counters, "q", (torch.int64,))
    copy = outputs[4] if len(outputs) > 4 else None
    if copy is not None:
        tensors["copy"] = (copy, "rn", (torch.bfloat16, torch.float32))
    check("adamw", tensors, unaligned=("clip", "lr", "finite", "counters"))
    launch = _launch(master.numel(), betas, eps, weight_decay, ema_decay, copy is not None, table_of(master))
    launch.run(
        adamw_kernel,
        *(master, exp_avg, exp_avg_sq, ema, gradient, master if copy is None else copy, clip, finite, counters, lr),
        master.numel(),
        decay_boundary(**decay),
    )


def sum_of_squares(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """x [1, N] fp32 -> a scalar; as :func:`adamw`."""
    (x,), (out,) = inputs, outputs
    check("sum_of_squares", {"x": (x, "rn", STATISTICS), "out": (out, "", STATISTICS)}, unaligned=("out",))
    launch = _squares_launch(x.numel())
    sums = scratch(x, launch.grid[0])
    launch.run(squares_kernel, x, sums, x.numel())
    sum_slices(sums, out)


# -- the compile check ------------------------------------------------------------------------------------------------


def compile_specs(sizes: Sizes) -> list[Spec]:
    """AdamW without and with the copy, the sum of squares and its second stage."""
    n = sizes.shard_elements
    shape, flat = {"N": n}, ("fp32", (1, n))
    squares = _squares_launch(n)

    def update(name: str, copy: bool) -> Spec:
        states = dict.fromkeys(("master", "exp_avg", "exp_avg_sq", "ema", "gradient"), flat)
        scalars = {"clip": ("fp32", ()), "finite": ("i1", ()), "counters": ("i64", (2,)), "learning_rate": ("fp32", ())}
        return _launch(n, (0.9, 0.95), 1e-8, 0.1, 0.9999, copy).spec(
            name,
            adamw_kernel,
            {**states, "copy": ("bf16" if copy else "fp32", (1, n)), **scalars},
            {"elements": ("i32", n), "boundary": ("i32", n)},
            shape,
            (38 if copy else 36) * n + 4 + 1 + 8 + 4,
        )

    return [
        update("adamw.update", False),
        update("adamw.update_with_copy", True),
        squares.spec(
            "adamw.sum_of_squares",
            squares_kernel,
            {"x": flat, "sums": ("fp32", squares.grid)},
            {"elements": ("i32", n)},
            shape,
            4 * n + 4,
        ),
        sum_spec("adamw.sum", squares.grid[0], 1),
    ]
