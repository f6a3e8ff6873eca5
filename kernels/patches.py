"""Patchify and un-patchify in Triton: a latent's values move between [B, C, T, H, W] and a row of values a token.

    tokens[(i, j, k), b, (c, a, r, s)] = latent[b, c, i kt + a, j kh + r, k kw + s]

Shapes   latent [B, C, T, H, W]; tokens [tokens of this rank, B, C kt kh kw], token = (i * (H / kh) + j) * (W / kw) + k.
Bytes    least: every value read once and written once.
Tiling   on one side values are contiguous along W, on the other along a token, so a tile is turned in registers
         (through shared memory): the rows (c, a, r) of 16 tokens that lie side by side along W, that is 32 values of 4
         bytes a row on the one side and 256 bytes a token on the other, 16 bytes an access on both. Tokens may begin
         and end inside a row of the grid: programs cover the rows that it touches, and mask what it does not hold, at
         8 bytes an access on the latent's side. No share of a 768 px sample does (4,608 tokens are 96 rows).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check
from .spec import Sizes, Spec
from .tiles import ITEM_BYTES, Launch, cover, power_of_two

DTYPES = (torch.float32, torch.bfloat16)
TOKENS = 16


@triton.jit
def patches_kernel(
    latent: tl.tensor,
    tokens: tl.tensor,
    first: int,
    count: int,
    batch: int,
    C: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    TOKENS: tl.constexpr,
    WHOLE: tl.constexpr,
    BACK: tl.constexpr,
) -> None:
    """``TOKENS`` tokens of one row of the grid of one sample, of the rank's tokens ``first`` to ``first + count``.

    ``ROWS`` >= C KT KH and ``RUN`` >= KW are powers of two. ``WHOLE``: the rank holds whole rows of the grid,
    so that no mask cuts an access in two. ``BACK``: from tokens to latent.
    """
    GRID_W: tl.constexpr = W // KW
    GRID_H: tl.constexpr = H // KH
    grid_row = first // GRID_W + tl.program_id(0)
    sample = tl.program_id(2).to(tl.int64)
    i = grid_row // GRID_H
    j = grid_row % GRID_H

    row = tl.arange(0, ROWS)
    c = row // (KT * KH)
    a = row // KH % KT
    r = row % KH
    line = (((sample * C + c) * T + i * KT + a) * H + j * KH + r) * W
    step = tl.arange(0, TOKENS * RUN)
    if RUN == KW:
        along = tl.program_id(1) * (TOKENS * RUN) + step
        inside = along < W
    else:
        along = (tl.program_id(1) * TOKENS + step // RUN) * KW + step % RUN
        inside = (along < W) & (step % RUN < KW)
    if not WHOLE:
        held = grid_row * GRID_W + along // KW - first
        inside = inside & (held >= 0) & (held < count)
    latent_at = line[:, None] + along[None, :]
    latent_mask = (row < C * KT * KH)[:, None] & inside[None, :]

    k = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    place = grid_row * GRID_W + k - first
    value = tl.arange(0, ROWS * RUN)
    if RUN == KW:
        column = value
        filled = value < C * KT * KH * KW
    else:
        column = value // RUN * KW + value % RUN
        filled = (value // RUN < C * KT * KH) & (value % RUN < KW)
    token_at = (place.to(tl.int64) * batch + sample)[:, None] * (C * KT * KH * KW) + column[None, :]
    token_mask = ((k < GRID_W) & (place >= 0) & (place < count))[:, None] & filled[None, :]

    if BACK:
        tile = tl.load(tokens + token_at, mask=token_mask, other=0.0)
        tile = tl.permute(tl.reshape(tile, (TOKENS, ROWS, RUN)), (1, 0, 2))
        tile = tl.reshape(tile, (ROWS, TOKENS * RUN))
        tl.store(latent + latent_at, tile, mask=latent_mask)
    else:
        tile = tl.load(latent + latent_at, mask=latent_mask, other=0.0)
        tile = tl.permute(tl.reshape(tile, (ROWS, TOKENS, RUN)), (1, 0, 2))
        tile = tl.reshape(tile, (TOKENS, ROWS * RUN))
        tl.store(tokens + token_at, tile, mask=token_mask)


# -- launchers --------------------------------------------------------------------------------------------------------


def _launch(
    first: int, count: int, batch: int, latent: tuple[int, ...], patch: tuple[int, int, int], back: bool
) -> Launch:
    (c, t, h, w), (kt, kh, kw) = latent, patch
    grid_w = w // kw
    rows = (first + count - 1) // grid_w - first // grid_w + 1
    extents = {"C": c, "T": t, "H": h, "W": w, "KT": kt, "KH": kh, "KW": kw}
    tile = {"ROWS": power_of_two(c * kt * kh), "RUN": power_of_two(kw), "TOKENS": TOKENS}
    kind = {"WHOLE": first % grid_w == 0 and count % grid_w == 0, "BACK": back}
    return Launch((rows, cover(grid_w, TOKENS), batch), {**extents, **tile, **kind})


def _check(op: str, latent: Tensor, tokens: Tensor) -> None:
    check(op, {"latent": (latent, "bcfyx", DTYPES), "tokens": (tokens, "tbp", DTYPES)})


def patchify(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    patch: tuple[int, int, int],
    latent: tuple[int, ...],
    rank: int,
) -> None:
    """[B, C, T, H, W] -> this rank's tokens. CUDA or interpreted. Raises CinemeshError for a tensor it cannot take."""
    (whole,), (tokens,) = inputs, outputs
    _check("patchify", whole, tokens)
    count, batch = tokens.shape[:2]
    launch = _launch(rank * count, count, batch, latent, patch, back=False)
    launch.run(patches_kernel, whole, tokens, rank * count, count, batch)


def unpatchify(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, patch: tuple[int, int, int], grid: tuple[int, int, int]
) -> None:
    """All tokens -> [B, C, T, H, W]; as :func:`patchify`."""
    (tokens,), (whole,) = inputs, outputs
    _check("unpatchify", whole, tokens)
    count, batch = tokens.shape[:2]
    launch = _launch(0, count, batch, tuple(whole.shape[1:]), patch, back=True)
    launch.run(patches_kernel, whole, tokens, 0, count, batch)


# -- the compile check ------------------------------------------------------------------------------------------------


def compile_specs(sizes: Sizes) -> list[Spec]:
    """Patchify of a rank's tokens and un-patchify of all."""
    b = sizes.batch
    p = sizes.latent[0] * sizes.patch[0] * sizes.patch[1] * sizes.patch[2]

    def spec(name: str, tokens: int, back: bool) -> Spec:
        return _launch(0, tokens, b, sizes.latent, sizes.patch, back).spec(
            name,
            patches_kernel,
            {"latent": ("fp32", (b, *sizes.latent)), "tokens": ("fp32", (tokens, b, p))},
            {"first": ("i32", 0), "count": ("i32", tokens), "batch": ("i32", b)},
            {"T": tokens, "B": b, "P": p},
            2 * ITEM_BYTES["fp32"] * tokens * b * p,
        )

    return [spec("patches.patchify", sizes.local_tokens, False), spec("patches.unpatchify", sizes.tokens, True)]
