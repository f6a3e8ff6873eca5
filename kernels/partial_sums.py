"""The second stage of every deterministic sum in Triton: partial sums of programs, added in one fixed order.

    out[n] = alpha * sum_s partial[s, n]   (+ out[n])

Shapes   partial [S, N] fp32; out [N] fp32. N = 1 for a loss or a norm.
Bytes    least: 4 * (S * N + N).
Tiling   a program owns 64 columns and walks the slices 32 at a time, so 6,144 columns make 96 programs; a scalar is one
         program. No atomics: what a program adds, and when, never depends on which one ran first.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .spec import Spec
from .tiles import Launch, cover

COLUMNS = 64
SLICES = 32
SCALAR_BLOCK = 1024


@triton.jit
def sum_slices_kernel(
    partial: tl.tensor,
    out: tl.tensor,
    slices: int,
    alpha: float,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, slices, ROWS):
        which = (first + row).to(tl.int64)
        mask = (which < slices)[:, None] & inside[None, :]
        total += tl.load(partial + which[:, None] * N + column[None, :], mask=mask, other=0.0)
    result = tl.sum(total, 0) * alpha
    if ADD:
        result += tl.load(out + column, mask=inside, other=0.0)
    tl.store(out + column, result, mask=inside)


def _launch(columns: int, add: bool) -> Launch:
    block, rows = (1, SCALAR_BLOCK) if columns == 1 else (COLUMNS, SLICES)
    return Launch((cover(columns, block),), {"N": columns, "BLOCK": block, "ROWS": rows, "ADD": add})


def sum_slices(partial: Tensor, out: Tensor, *, alpha: float = 1.0, add: bool = False) -> None:
    """``out (+)= alpha * partial.sum(0)`` for ``partial`` [S, ...] fp32 and ``out`` fp32 of the other dims."""
    launch = _launch(out.numel(), add)
    launch.run(sum_slices_kernel, partial, out, partial.shape[0], alpha)


def sum_spec(name: str, slices: int, columns: int, *, add: bool = False) -> Spec:
    """The second stage that ``name`` runs."""
    return _launch(columns, add).spec(
        name,
        sum_slices_kernel,
        {"partial": ("fp32", (slices, columns)), "out": ("fp32", (columns,))},
        {"slices": ("i32", slices), "alpha": ("fp32", 1.0)},
        {"S": slices, "N": columns},
        4 * columns * (slices + 1 + add),
    )
