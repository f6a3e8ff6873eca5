"""Attention backward in Triton: two kernels that each own their outputs, so that nothing is added atomically.

    p = exp(s - lse)    delta = rowsum(do * o)    ds = p * (do v^T - delta)
    dv = p^T do         dk = ds^T q / sqrt(K)     dq = ds k / sqrt(K)              (Dao, "FlashAttention-2", 2023)

Shapes   as in ``attention.py``; do, dq [T, B, H, K]; dkv [S, B, 2, H, K], which the reduce-scatter over cp sends as it
         is; delta [B, H, T] fp32 is scratch. A padded key's gradient is 0.
Bytes    least: ``queries_kernel`` reads do, q, o, kv, lse and writes dq, delta; ``keys_kernel`` reads do, q, kv, lse,
         delta and writes dkv. Each reads the other side's rows again for every block of its own, mostly from L2.
Tiling   ``queries_kernel``: 128 queries (two warpgroups of 64 rows) walk 64 keys at a time: a thread holds 64 floats of
         dq and 32 each of s and dp; do (32 KB) and three stages of K and V (96 KB) fit in 227 KB. Products of 64 keys
         whose two factors lie in shared memory read it as fast as it gives (128 B a clock: 4 KB for 64 x 64 x 16 in 32
         clocks), and K and V come in over it too; q in registers (``left_factor``) takes a sixth of all that away, and
         only s waits for nothing but its product: exponentials run beside dp's. Not where it costs a program of two
         (K 64) or the last registers (a key mask).
         ``keys_kernel``: 128 keys walk 64 queries at a time: 64 floats each of dk and dv, 32 each of p and dp and 16
         registers of p in bf16 are 208 of 255, and a row of statistics is 16 more. So delta enters as the first value
         of dp's accumulator, and padded keys are dropped from the sums instead of from every p: a key's sums are its
         own. Ragged keys need predicates besides, and walk 32 queries. A text has few keys (868): blocks of 64 make
         twice the programs.
Seven products, where atomic adds on dq would need five, buy the same gradient, bit for bit, on every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import (
    LN_2,
    LOG2_E,
    Arguments,
    block_tile,
    checked,
    chosen_tile,
    launch,
    least_bytes,
    left_factor,
    narrowed,
    problems,
    product,
    spec,
    strides,
    tile_of,
)
from .device import scratch
from .spec import Sizes, Spec
from .tiles import Launch


@triton.jit
def queries_kernel(
    do: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    o: tl.tensor,
    lse: tl.tensor,
    mask: tl.tensor,
    dq: tl.tensor,
    delta: tl.tensor,
    queries: int,
    keys: int,
    do_row: tl.tensor,
    do_sample: tl.tensor,
    do_head: tl.tensor,
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
    dq_row: tl.tensor,
    dq_sample: tl.tensor,
    dq_head: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HELD: tl.constexpr,
    WHOLE_KEYS: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    """dq and delta of one block of queries of one head; arguments as in the forward kernel."""
    SCALE: tl.constexpr = LOG2_E / HEAD_DIM**0.5
    first = tl.program_id(0).to(tl.int64) * BLOCK_QUERIES
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, BLOCK_QUERIES)
    key = tl.arange(0, BLOCK_KEYS)
    column = tl.arange(0, HEAD_DIM)
    valid = row < queries - first

    do += first * do_row + sample * do_sample + head * do_head
    q += first * q_row + sample * q_sample + head * q_head
    o += first * o_row + sample * o_sample + head * o_head
    lse += first + sample * lse_sample + head * lse_head
    k += sample * kv_sample + head * kv_head
    v += sample * kv_sample + head * kv_head
    do_tile = tl.load(do + row[:, None] * do_row + column[None, :], mask=valid[:, None], other=0.0)
    q_tile = tl.load(q + row[:, None] * q_row + column[None, :], mask=valid[:, None], other=0.0)
    o_tile = tl.load(o + row[:, None] * o_row + column[None, :], mask=valid[:, None], other=0.0)
    lse2 = tl.load(lse + row, mask=valid, other=0.0) * LOG2_E
    row_delta = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1, keep_dims=True)
    delta += (sample * tl.num_programs(1) + head) * queries + first
    tl.store(delta + row[:, None], row_delta, mask=valid[:, None])

    q_tile = left_factor(q_tile, HEAD_DIM, HELD)
    mask += sample * mask_sample
    kv_offset = key[:, None] * kv_row + column[None, :]
    accumulator = tl.zeros([BLOCK_QUERIES, HEAD_DIM], tl.float32)
    for start in range(0, keys, BLOCK_KEYS):
        at = tl.cast(start, tl.int64) * kv_row
        seen = key < keys - start
        k_tile = tile_of(k + at + kv_offset, seen, WHOLE_KEYS)
        v_tile = tile_of(v + at + kv_offset, seen, WHOLE_KEYS)
        if MASKED:
            seen = tl.load(mask + start + key, mask=seen, other=0).to(tl.int1)
        scores = product(q_tile, k_tile.T, None)
        if MASKED or not WHOLE_KEYS:
            scores = tl.where(seen[None, :], scores, float("-inf"))
        weights = tl.exp2(scores * SCALE - lse2[:, None])
        dweights = product(do_tile, v_tile.T, None)
        dscores = weights * (dweights - row_delta)
        accumulator = product(narrowed(dscores, k_tile), k_tile, accumulator)

    dq += first * dq_row + sample * dq_sample + head * dq_head
    dq_tile = narrowed(accumulator * (SCALE * LN_2), q_tile)
    tl.store(dq + row[:, None] * dq_row + column[None, :], dq_tile, mask=valid[:, None])


@triton.jit
def keys_kernel(
    do: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    mask: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    queries: int,
    keys: int,
    do_row: tl.tensor,
    do_sample: tl.tensor,
    do_head: tl.tensor,
    q_row: tl.tensor,
    q_sample: tl.tensor,
    q_head: tl.tensor,
    kv_row: tl.tensor,
    kv_sample: tl.tensor,
    kv_head: tl.tensor,
    lse_sample: tl.tensor,
    lse_head: tl.tensor,
    mask_sample: tl.tensor,
    dkv_row: tl.tensor,
    dkv_sample: tl.tensor,
    dkv_head: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    WHOLE_QUERIES: tl.constexpr,
    WHOLE_KEYS: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    """dk and dv of one block of keys of one head. ``WHOLE_QUERIES``, ``WHOLE_KEYS``: no block is ragged."""
    SCALE: tl.constexpr = LOG2_E / HEAD_DIM**0.5
    first = tl.program_id(0).to(tl.int64) * BLOCK_KEYS
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, BLOCK_QUERIES)
    key = tl.arange(0, BLOCK_KEYS)
    column = tl.arange(0, HEAD_DIM)
    valid = key < keys - first if not WHOLE_KEYS else tl.full([BLOCK_KEYS], 1, tl.int1)

    k += first * kv_row + sample * kv_sample + head * kv_head
    v += first * kv_row + sample * kv_sample + head * kv_head
    kv_offset = key[:, None] * kv_row + column[None, :]
    k_tile = tl.load(k + kv_offset, mask=valid[:, None], other=0.0)
    v_tile = tl.load(v + kv_offset, mask=valid[:, None], other=0.0)
    do += sample * do_sample + head * do_head
    q += sample * q_sample + head * q_head
    lse += sample * lse_sample + head * lse_head
    delta += (sample * tl.num_programs(1) + head) * queries
    q_offset = row[:, None] * q_row + column[None, :]
    do_offset = row[:, None] * do_row + column[None, :]
    dk_sum = tl.zeros([BLOCK_KEYS, HEAD_DIM], tl.float32)
    dv_sum = tl.zeros([BLOCK_KEYS, HEAD_DIM], tl.float32)
    for start in range(0, queries, BLOCK_QUERIES):
        at = tl.cast(start, tl.int64)
        there = row < queries - start
        q_tile = tile_of(q + at * q_row + q_offset, there, WHOLE_QUERIES)
        do_tile = tile_of(do + at * do_row + do_offset, there, WHOLE_QUERIES)
        if WHOLE_QUERIES:
            lse2 = tl.load(lse + at + row) * LOG2_E
            row_delta = tl.load(delta + at + row)
        else:  # zeros of do and delta make their share of the sums 0
            lse2 = tl.load(lse + at + row, mask=there, other=0.0) * LOG2_E
            row_delta = tl.load(delta + at + row, mask=there, other=0.0)
        scores = product(k_tile, q_tile.T, None)
        weights = tl.exp2(scores * SCALE - lse2[None, :])
        dv_sum = product(narrowed(weights, do_tile), do_tile, dv_sum)
        dweights = tl.broadcast_to(-row_delta[None, :], [BLOCK_KEYS, BLOCK_QUERIES])
        dweights = product(v_tile, do_tile.T, dweights)
        dk_sum = product(narrowed(weights * dweights, q_tile), q_tile, dk_sum)

    at = first * dkv_row + sample * dkv_sample + head * dkv_head
    dkv_offset = key[:, None] * dkv_row + column[None, :]
    dk_sum *= SCALE * LN_2
    if MASKED:
        seen = tl.load(mask + sample * mask_sample + first + key, mask=valid, other=0).to(tl.int1)
        dk_sum = tl.where(seen[:, None], dk_sum, 0.0)
        dv_sum = tl.where(seen[:, None], dv_sum, 0.0)
    tl.store(dk + at + dkv_offset, narrowed(dk_sum, k_tile), mask=valid[:, None])
    tl.store(dv + at + dkv_offset, narrowed(dv_sum, v_tile), mask=valid[:, None])


# -- launchers --------------------------------------------------------------------------------------------------------


def _statistics(lse: Tensor, mask: Tensor | None) -> dict[str, int]:
    return {
        "lse_sample": lse.stride(0),
        "lse_head": lse.stride(1),
        "mask_sample": 0 if mask is None else mask.stride(0),
    }


def _queries(
    op: str, do: Tensor, q: Tensor, kv: Tensor, o: Tensor, lse: Tensor, mask: Tensor | None, dq: Tensor, delta: Tensor
) -> tuple[Launch, Arguments]:
    """How :func:`queries_kernel` is launched on these tensors."""
    k, v = kv[:, :, 0], kv[:, :, 1]
    arguments: dict[str, Any] = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse}
    arguments |= {"mask": q if mask is None else mask, "dq": dq, "delta": delta}
    arguments |= {"queries": q.shape[0], "keys": kv.shape[0]}
    arguments |= strides("do", do) | strides("q", q) | strides("kv", k) | strides("o", o) | strides("dq", dq)
    arguments |= _statistics(lse, mask)
    default = block_tile(32, 32, 8, 2) if q.dtype == torch.float32 else block_tile(128, 64, 8, 3)
    default["HELD"] = int(q.dtype == torch.bfloat16 and q.shape[3] == 128 and mask is None)
    tile = chosen_tile(f"{op}.queries", default, q, k)
    whole = kv.shape[0] % tile["BLOCK_KEYS"] == 0
    return launch(q, q.shape[0], tile, "BLOCK_QUERIES", WHOLE_KEYS=whole, MASKED=mask is not None), arguments


def _keys(
    op: str, do: Tensor, q: Tensor, kv: Tensor, lse: Tensor, delta: Tensor, mask: Tensor | None, dkv: Tensor
) -> tuple[Launch, Arguments]:
    """How :func:`keys_kernel` is launched on these tensors."""
    k, v, dk, dv = kv[:, :, 0], kv[:, :, 1], dkv[:, :, 0], dkv[:, :, 1]
    arguments: dict[str, Any] = {"do": do, "q": q, "k": k, "v": v, "lse": lse, "delta": delta}
    arguments |= {"mask": q if mask is None else mask, "dk": dk, "dv": dv}
    arguments |= {"queries": q.shape[0], "keys": kv.shape[0]}
    arguments |= strides("do", do) | strides("q", q) | strides("kv", k) | strides("dkv", dk)
    arguments |= _statistics(lse, mask)
    if q.dtype == torch.float32:
        default = block_tile(16, 32, 8, 2)
    elif mask is not None:
        default = block_tile(32, 64, 4, 3)
    elif kv.shape[0] % 128 and q.shape[3] == 128:
        default = block_tile(32, 128, 8, 3)
    else:
        default = block_tile(64, 128, 8, 3)
    tile = chosen_tile(f"{op}.keys", default, q, k)
    whole = {
        "WHOLE_QUERIES": q.shape[0] % tile["BLOCK_QUERIES"] == 0,
        "WHOLE_KEYS": kv.shape[0] % tile["BLOCK_KEYS"] == 0,
    }
    return launch(q, kv.shape[0], tile, "BLOCK_KEYS", **whole, MASKED=mask is not None), arguments


def attention_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """do, q, kv, o, lse, [key mask] -> dq, dkv; CUDA or interpreted. Raises CinemeshError as the forward does."""
    do, q, kv, o, lse, *masks = inputs
    dq, dkv = outputs
    mask = masks[0] if masks else None
    op = "cross_attention_backward" if masks else "attention_backward"
    checked(op, do=do, q=q, kv=kv, o=o, lse=lse, mask=mask, dq=dq, dkv=dkv)
    delta = scratch(lse, *lse.shape)
    launch, arguments = _queries(op, do, q, kv, o, lse, mask, dq, delta)
    queries_kernel[launch.grid](**{**arguments, **launch.options})
    launch, arguments = _keys(op, do, q, kv, lse, delta, mask, dkv)
    keys_kernel[launch.grid](**{**arguments, **launch.options})


cross_attention_backward = attention_backward


# -- the compile check ------------------------------------------------------------------------------------------------


def compile_specs(sizes: Sizes) -> list[Spec]:
    """Both kernels, of self-attention and of cross-attention."""
    found = []
    for problem, x in problems(sizes).items():
        op = f"{problem}_backward"
        mask, delta = x.get("mask"), scratch(x["lse"], *x["lse"].shape)
        queries = x["do"], x["q"], x["kv"], x["o"], x["lse"], mask, x["dq"], delta
        keys = x["do"], x["q"], x["kv"], x["lse"], delta, mask, x["dkv"]
        found += [
            spec(f"{op}.queries", queries_kernel, *_queries(op, *queries), x["kv"], least_bytes(*queries)),
            spec(f"{op}.keys", keys_kernel, *_keys(op, *keys), x["kv"], least_bytes(*keys)),
        ]
    return found
