"""Attention forward in Triton: bidirectional, online softmax, log-sum-exp out, no score matrix in memory.

    s = q k^T / sqrt(K)    lse = log sum_j exp(s_j)    o = softmax(s) v            (Dao, "FlashAttention-2", 2023)

Shapes   q, o [T, B, H, K]; kv [S, B, 2, H, K]; lse [B, H, T] fp32; key mask [B, S] bool, True where valid (one or more
         a sample). Any T, S, B, H; K is 64 or 128. Heads may be a slice at an offset in larger buffers: every tensor is
         read by its strides, only its last dim must be dense.
Bytes    least: q, kv, o, lse once. K and V are read again by every block of queries, mostly from L2: the grid walks the
         queries of one head before the next, and K and V of one head (73,728 keys, K = 128, bf16: 38 MB) fit in the
         50 MB of an H100. A block of 128 queries does 512 K FLOPs for the 4 K bytes of a key: 128 FLOPs a byte of L2.
Tiling   one program owns a block of queries of one head and walks all keys. 128 queries are two warpgroups of 64 rows,
         the M of wgmma. With 64 keys a thread holds 64 floats of o, 32 each of this block's and of the next block's
         scores: the next q k^T runs on the tensor cores while this block's exponentials, half as slow as the two
         products together, run on the special function units (Shah et al., "FlashAttention-3", 2024, section 3.2).
         q (32 KB) and three stages of K and V (6 * 16 KB) fit in 227 KB of shared memory.
         fp32 products are exact ("ieee", on the ordinary cores): that policy is for proofs, not for speed.

Deterministic: a program owns its outputs and sums in one fixed order. Rows are addressed in int64; offsets inside a
tile are int32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from .checks import check
from .device import table_of
from .dtypes import BY_TRITON_NAME
from .spec import Sizes, Spec
from .tiles import TRITON_DTYPES, Launch, cover
from .tuning import shape_class, tile

HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float32)
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
# Not -inf as the first running maximum: a block without a valid key then weighs exp2(-inf - LOWEST) = 0, not NaN.
LOWEST = tl.constexpr(-1.0e30)

INTERPRETED = tl.constexpr(knobs.runtime.interpret)

Arguments = Mapping[str, Any]


@triton.jit
def product(a: tl.tensor, b: tl.tensor, accumulator: tl.tensor | None) -> tl.tensor:
    """accumulator + a b, summed in fp32. The interpreter keeps bf16 as integers: there, factors are widened first."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def narrowed(x: tl.tensor, like: tl.tensor) -> tl.tensor:
    """fp32 in the dtype of ``like``, to nearest even; the interpreter cuts bits off, so half of the last is added."""
    if INTERPRETED and tl.bfloat16 == like.dtype:
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(like.dtype)


@triton.jit
def tile_of(pointers: tl.tensor, rows: tl.tensor, WHOLE: tl.constexpr) -> tl.tensor:
    """A tile of which ``rows`` exist, all of them if ``WHOLE``; zeros in the others."""
    if WHOLE:
        return tl.load(pointers)
    return tl.load(pointers, mask=rows[:, None], other=0.0)


@triton.jit
def left_factor(tile: tl.tensor, HEAD_DIM: tl.constexpr, HELD: tl.constexpr) -> tl.tensor:
    """The same values [rows, K]; if ``HELD``, times the identity: a result of the tensor cores stays in registers.

    Any other left factor of wgmma lies in shared memory, and every product reads it there again.
    """
    if HELD:
        column = tl.arange(0, HEAD_DIM)
        identity = (column[:, None] == column[None, :]).to(tl.float32)
        tile = narrowed(product(tile, narrowed(identity, tile), None), tile)
    return tile


@triton.jit
def forward_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    mask: tl.tensor,
    o: tl.tensor,
    lse: tl.tensor,
    queries: int,
    keys: int,
    q_row: tl.tensor,
    q_sample: tl.tensor,
    q_head: tl.tensor,
    kv_row: tl.tensor,
    kv_sample: tl.tensor,
    kv_head: tl.tensor,
    o_row: tl.tensor,
    o_sample: tl.tensor,
    o_head: tl.tensor,
    lse_sample: tl.tensor,
    lse_head: tl.tensor,
    mask_sample: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HELD: tl.constexpr,
    WHOLE_KEYS: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    """One block of queries of one head. Strides in elements; ``WHOLE_KEYS``: keys % BLOCK_KEYS == 0.

    ``HELD``: q in registers.
    """
    SCALE: tl.constexpr = LOG2_E / HEAD_DIM**0.5
    first = tl.program_id(0).to(tl.int64) * BLOCK_QUERIES
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, BLOCK_QUERIES)
    key = tl.arange(0, BLOCK_KEYS)
    column = tl.arange(0, HEAD_DIM)
    valid = row < queries - first

    q += first * q_row + sample * q_sample + head * q_head
    k += sample * kv_sample + head * kv_head
    v += sample * kv_sample + head * kv_head
    q_tile = tl.load(q + row[:, None] * q_row + column[None, :], mask=valid[:, None], other=0.0)
    q_tile = left_factor(q_tile, HEAD_DIM, HELD)
    kv_offset = key[:, None] * kv_row + column[None, :]

    largest = tl.full([BLOCK_QUERIES], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    accumulator = tl.zeros([BLOCK_QUERIES, HEAD_DIM], tl.float32)
    mask += sample * mask_sample
    last = (tl.cdiv(keys, BLOCK_KEYS) - 1) * BLOCK_KEYS
    scores = product(q_tile, tile_of(k + kv_offset, key < keys, WHOLE_KEYS).T, None)
    for start in range(0, keys, BLOCK_KEYS):
        # The next block's scores are under way while these are weighed; behind the last block, it is read again.
        ahead = tl.minimum(start + BLOCK_KEYS, last)
        k_tile = tile_of(k + tl.cast(ahead, tl.int64) * kv_row + kv_offset, key < keys - ahead, WHOLE_KEYS)
        v_tile = tile_of(v + tl.cast(start, tl.int64) * kv_row + kv_offset, key < keys - start, WHOLE_KEYS)
        seen = key < keys - start
        if MASKED:
            seen = tl.load(mask + start + key, mask=seen, other=0).to(tl.int1)
        following = product(q_tile, k_tile.T, None)
        if MASKED or not WHOLE_KEYS:
            scores = tl.where(seen[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1) * SCALE)
        weights = tl.exp2(scores * SCALE - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weights, 1)
        accumulator = product(narrowed(weights, v_tile), v_tile, accumulator * shrink[:, None])
        largest = larger
        scores = following

    o += first * o_row + sample * o_sample + head * o_head
    lse += first + sample * lse_sample + head * lse_head
    o_tile = narrowed(accumulator / total[:, None], q_tile)
    tl.store(o + row[:, None] * o_row + column[None, :], o_tile, mask=valid[:, None])
    tl.store(lse + row, (largest + tl.log2(total)) * LN_2, mask=valid)


# -- launchers --------------------------------------------------------------------------------------------------------

LABELS = {
    **dict.fromkeys(("q", "o", "do", "dq"), "tbhk"),
    **dict.fromkeys(("kv", "dkv"), "sbchk"),
    "lse": "bht",
    "mask": "bs",
}


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Row, sample and head strides of [rows, B, H, K], in elements."""
    return {f"{name}_row": x.stride(0), f"{name}_sample": x.stride(1), f"{name}_head": x.stride(2)}


def checked(op: str, **tensors: Tensor | None) -> None:
    """CinemeshError for a tensor that these kernels cannot take."""
    dtype = next(x.dtype for x in tensors.values() if x is not None)
    allowed = {"lse": (torch.float32,), "mask": (torch.bool,)}
    streams = (dtype,) if dtype in DTYPES else DTYPES
    check(
        op,
        {name: (x, LABELS[name], allowed.get(name, streams)) for name, x in tensors.items() if x is not None},
        strided=tuple(tensors),
        unaligned=("lse", "mask"),
        offered={"k": HEAD_DIMS, "c": (2,)},
    )


def chosen_tile(kernel: str, default: Mapping[str, int], q: Tensor, k: Tensor) -> dict[str, int]:
    """The device's tuned tile, else ``default``; by sizes of the problem and bytes of an element."""
    shape = shape_class(E=q.element_size(), K=q.shape[-1], S=k.shape[0], T=q.shape[0])
    return tile(kernel, shape, default, table_of(q))


def block_tile(queries: int, keys: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_QUERIES": queries, "BLOCK_KEYS": keys, "num_warps": warps, "num_stages": stages}


def launch(q: Tensor, rows: int, tile: Mapping[str, int], block: str, **constexprs: bool) -> Launch:
    """One program for each ``block`` of ``rows``, head and sample."""
    constants = {key: size for key, size in tile.items() if key.isupper()}
    grid = (cover(rows, tile[block]), q.shape[2], q.shape[1])
    everything = {"HEAD_DIM": q.shape[3], **constants, **constexprs}
    return Launch(grid, everything, num_warps=tile["num_warps"], num_stages=tile["num_stages"])


def _forward(op: str, q: Tensor, kv: Tensor, mask: Tensor | None, o: Tensor, lse: Tensor) -> tuple[Launch, Arguments]:
    """How :func:`forward_kernel` is launched on these tensors."""
    k, v = kv[:, :, 0], kv[:, :, 1]
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "mask": q if mask is None else mask, "o": o}
    arguments |= {"lse": lse, "queries": q.shape[0], "keys": kv.shape[0]}
    arguments |= strides("q", q) | strides("kv", k) | strides("o", o)
    arguments |= {"lse_sample": lse.stride(0), "lse_head": lse.stride(1)}
    arguments |= {"mask_sample": 0 if mask is None else mask.stride(0)}
    default = block_tile(16, 16, 8, 2) if q.dtype == torch.float32 else block_tile(128, 64, 8, 3)
    default["HELD"] = 0  # with q in registers the compiler waits for the next scores before it weighs these
    tile = chosen_tile(f"{op}.forward", default, q, k)
    whole = kv.shape[0] % tile["BLOCK_KEYS"] == 0
    return launch(q, q.shape[0], tile, "BLOCK_QUERIES", WHOLE_KEYS=whole, MASKED=mask is not None), arguments


def attention(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """q, kv, [key mask] -> o, lse; CUDA or interpreted. Raises CinemeshError for a tensor that it cannot take."""
    q, kv, *masks = inputs
    o, lse = outputs
    mask = masks[0] if masks else None
    op = "cross_attention" if masks else "attention"
    checked(op, q=q, kv=kv, mask=mask, o=o, lse=lse)
    launch, arguments = _forward(op, q, kv, mask, o, lse)
    forward_kernel[launch.grid](**{**arguments, **launch.options})


cross_attention = attention


# -- the compile check ------------------------------------------------------------------------------------------------


def least_bytes(*tensors: Tensor | None) -> int:
    """Every element once."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def problems(sizes: Sizes) -> dict[str, dict[str, Tensor]]:
    """Self- and cross-attention of a step of these sizes: every tensor by name, without storage."""
    dtype = BY_TRITON_NAME[sizes.dtype]
    t, b, h, k = sizes.context_tokens, sizes.batch, sizes.local_heads, sizes.head_dim
    found: dict[str, dict[str, Tensor]] = {}
    for op, s in (("attention", sizes.tokens), ("cross_attention", sum(sizes.text_tokens))):
        extents = {"t": t, "s": s, "b": b, "h": h, "k": k, "c": 2}
        shapes = {name: [extents[label] for label in labels] for name, labels in LABELS.items()}
        own = {"lse": torch.float32, "mask": torch.bool}
        found[op] = {
            name: torch.empty(shape, dtype=own.get(name, dtype), device="meta") for name, shape in shapes.items()
        }
    del found["attention"]["mask"]
    return found


def spec(name: str, kernel: Any, launch: Launch, arguments: Arguments, kv: Tensor, least: int) -> Spec:
    """One launch for the compile check."""
    tensors = {key: x for key, x in arguments.items() if isinstance(x, Tensor)}
    scalars = {key: x for key, x in arguments.items() if isinstance(x, int)}
    q = tensors["q"]
    shape = dict(zip("TBHK", q.shape, strict=True)) | {"S": kv.shape[0]}
    from_here = {key: (TRITON_DTYPES[str(x.dtype).removeprefix("torch.")], _extent(x)) for key, x in tensors.items()}
    integers = {key: ("i64" if x >= 2**31 else "i32", x) for key, x in scalars.items()}
    return replace(launch.spec(name, kernel, from_here, integers, shape, least), memory_bound=False)


def _extent(x: Tensor) -> tuple[int, ...]:
    """The shape, or the elements from the first to the last of a strided view."""
    if x.is_contiguous():
        return tuple(x.shape)
    return (1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)),)


def compile_specs(sizes: Sizes) -> list[Spec]:
    """Forward of self-attention and of cross-attention."""
    found = []
    for op, x in problems(sizes).items():
        operands = x["q"], x["kv"], x.get("mask"), x["o"], x["lse"]
        least = least_bytes(*operands)
        found.append(spec(f"{op}.forward", forward_kernel, *_forward(op, *operands), x["kv"], least))
    return found
