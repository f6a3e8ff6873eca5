"""Attention merged from parts of the keys, and sums of several tensors, in Triton.

    lse = log sum_i exp lse_i        o = sum_i exp(lse_i - lse) o_i        sum = x_1 + ... + x_n

One part after the other, what was added so far is scaled to the largest lse_i met (Milakov and Gimelshein 2018,
arXiv 1805.02867, section 3.1).

Shapes   o_i, o, x_i, sum [T, B, H, K]; lse_i, lse [B, H, T] in fp32; n parts of each.
Bytes    least, for e bytes an element: the merge (n + 1) (e K + 4) T B H, the sum (n + 1) e T B H K.
Tiling   the pointers come as a tuple over which the kernels are unrolled: each part is read once, and nothing is
         written in between. The merge takes 16 tokens of one head, 128 threads of two loads of 16 bytes a part in bf16:
         rows of 256 bytes that the next program, the next head, goes on with, and two sectors of each log-sum-exp. With
         4 parts ten programs fit on a multiprocessor and 160 kB are in flight; with 32 tokens, 16 parts spill in fp32.
         The sum takes 4,096 elements of the flat tensors, 128 threads of four loads a part.

A part without keys (lse_i = -inf) counts for nothing, whatever its o_i holds; where no part has any, o = 0 and
lse = -inf. Deterministic: parts are added in order, in fp32.
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
from .tiles import ITEM_BYTES, Launch, cover, power_of_two
from .tuning import DEFAULT_DEVICE, shape_class, tile

STREAM = (torch.bfloat16, torch.float32)
STATISTICS = (torch.float32,)
TOKENS = 16
BLOCK = 4096
COMPILED_PARTS = (4, 16)


@triton.jit
def attention_kernel(
    parts: tl.tuple,
    part_lses: tl.tuple,
    o: tl.tensor,
    lse: tl.tensor,
    tokens: int,
    batch: int,
    heads: int,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """``TOKENS`` tokens of one head of one sample; ``WIDTH``: of a head."""
    head, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    row = (sample * heads + head) * tokens + token
    column = tl.arange(0, BLOCK)
    at = ((token * batch + sample) * heads + head)[:, None] * WIDTH + column[None, :]
    mask = inside[:, None] & (column < WIDTH)[None, :]
    largest = tl.full((TOKENS,), float("-inf"), tl.float32)
    weights = tl.zeros((TOKENS,), tl.float32)
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for i in tl.static_range(len(parts)):  # pyright: ignore[reportGeneralTypeIssues]
        log = tl.load(part_lses[i] + row, mask=inside, other=0.0)
        part = tl.load(parts[i] + at, mask=mask, other=0.0).to(tl.float32)
        grown = tl.maximum(largest, log)
        shift = tl.where(grown == float("-inf"), 0.0, grown)  # -inf - -inf is no number
        scale, weight = tl.exp(largest - shift), tl.exp(log - shift)
        weights = weights * scale + weight
        part = tl.where((log == float("-inf"))[:, None], 0.0, part * weight[:, None])
        total = total * scale[:, None] + part
        largest = grown
    nothing = weights == 0.0
    weights = tl.where(nothing, 1.0, weights)
    tl.store(lse + row, tl.where(nothing, largest, largest + tl.log(weights)), mask=inside)
    tl.store(o + at, total / weights[:, None], mask=mask)


@triton.jit
def sum_kernel(parts: tl.tuple, out: tl.tensor, elements: tl.tensor, BLOCK: tl.constexpr) -> None:
    """``BLOCK`` elements of the flat tensors."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(len(parts)):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(parts[i] + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total, mask=mask)


# -- launchers --------------------------------------------------------------------------------------------------------


def _attention_launch(
    parts: int, tokens: int, batch: int, heads: int, width: int, device: str = DEFAULT_DEVICE
) -> Launch:
    default = {"TOKENS": TOKENS, "num_warps": 4}
    best = tile("merge.attention", shape_class(N=parts, T=tokens * batch, K=width), default, device)
    sizes = {"WIDTH": width, "BLOCK": power_of_two(width), "TOKENS": best["TOKENS"]}
    return Launch((heads, cover(tokens, best["TOKENS"]), batch), sizes, num_warps=best["num_warps"])


def _sum_launch(parts: int, elements: int, device: str = DEFAULT_DEVICE) -> Launch:
    default = {"BLOCK": BLOCK, "num_warps": 4}
    best = tile("merge.sum", shape_class(N=parts, E=elements), default, device)
    return Launch((cover(elements, best["BLOCK"]),), {"BLOCK": best["BLOCK"]}, num_warps=best["num_warps"])


def merge_attention(inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, signature: str) -> None:
    """o_1, lse_1, o_2, lse_2, ... -> o, lse; CUDA or interpreted. Raises CinemeshError for a tensor it cannot take."""
    o, lse = outputs
    parts, part_lses = tuple(inputs[0::2]), tuple(inputs[1::2])
    stream = {"o": o, **{f"o of part {i}": part for i, part in enumerate(parts)}}
    statistics = {"lse": lse, **{f"lse of part {i}": part for i, part in enumerate(part_lses)}}
    sizes = check(
        "merge_attention",
        {name: (x, "tbhk", STREAM) for name, x in stream.items()}
        | {name: (x, "bht", STATISTICS) for name, x in statistics.items()},
    )
    tokens, batch, heads = sizes["t"], sizes["b"], sizes["h"]
    launch = _attention_launch(len(parts), tokens, batch, heads, sizes["k"], table_of(o))
    launch.run(attention_kernel, parts, part_lses, o, lse, tokens, batch, heads)


def sum_parts(inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, signature: str) -> None:
    """Addends of one shape -> their sum; as :func:`merge_attention`."""
    (out,) = outputs
    labels = signature.partition("->")[2]
    parts = {f"addend {i}": part for i, part in enumerate(inputs)}
    check("sum_parts", {name: (x, labels, STREAM) for name, x in {"out": out, **parts}.items()})
    launch = _sum_launch(len(inputs), out.numel(), table_of(out))
    launch.run(sum_kernel, tuple(inputs), out, out.numel())


# -- the compile check ------------------------------------------------------------------------------------------------


def compile_specs(sizes: Sizes) -> list[Spec]:
    """Merge and sum of a few, and of many, chunks of the keys."""
    t, b, h, k, kind = sizes.context_tokens, sizes.batch, sizes.local_heads, sizes.head_dim, sizes.dtype
    rows, item = t * b * h, ITEM_BYTES[kind]
    stream, statistics = (t, b, h, k), (b, h, t)
    specs: list[Spec] = []
    for n in COMPILED_PARTS:
        shape = {"N": n, "T": t, "B": b, "H": h, "K": k}
        specs += [
            _attention_launch(n, t, b, h, k).spec(
                "merge.attention",
                attention_kernel,
                {
                    "parts": ((kind,) * n, stream),
                    "part_lses": (("fp32",) * n, statistics),
                    "o": (kind, stream),
                    "lse": ("fp32", statistics),
                },
                {"tokens": ("i32", t), "batch": ("i32", b), "heads": ("i32", h)},
                shape,
                (n + 1) * (item * k + 4) * rows,
            ),
            _sum_launch(n, rows * k).spec(
                "merge.sum",
                sum_kernel,
                {"parts": ((kind,) * n, stream), "out": (kind, stream)},
                {"elements": ("i32", rows * k)},
                shape,
                (n + 1) * item * rows * k,
            ),
        ]
    return specs
