"""Adapters of the FlashAttention packages: 2 (``flash-attn``), 3 (built for Hopper), CuTe (``flash-attn-4``).

Their layout is [B, T, H, K], ours [T, B, H, K] and [S, B, 2, h, K]: both are read and written by strides, nothing is
transposed in memory. Versions 2 and 3 allocate o and the log-sum-exp, which are copied into ours; backward writes in
place everywhere. It sums dq by atomics, in any order, unless asked for a fixed one (``deterministic``).

Version 3 keeps one block on every SM, and can leave SMs alone (``sm_margin``); the others cannot be told to.

No key mask, no dropout, never causal. Source of the calls: Dao-AILab/flash-attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .attention_views import keep_outputs, keys_values, samples_first
from .checks import check, labelled

HALF = (torch.bfloat16, torch.float16)
STATISTICS = (torch.float32,)


def _forward_views(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(q, k, v, o) of an ``attention`` call, samples first; checked."""
    (q, kv), (o, _) = inputs, outputs
    names, dtypes = ("q", "kv", "o", "lse"), {"q": HALF, "lse": STATISTICS}
    tensors = labelled("attention", names, (*inputs, *outputs), dtypes, (q.dtype,))
    check("attention", tensors, strided=("q", "kv", "o"))
    return (samples_first(q), *keys_values(samples_first, kv), samples_first(o))


def _backward_views(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(do, q, k, v, o, dq, dk, dv) of an ``attention_backward`` call, samples first; checked."""
    (do, q, kv, o, _), (dq, dkv) = inputs, outputs
    names, dtypes = ("do", "q", "kv", "o", "lse", "dq", "dkv"), {"do": HALF, "q": HALF, "lse": STATISTICS}
    tensors = labelled("attention_backward", names, (*inputs, *outputs), dtypes, (q.dtype,))
    check("attention_backward", tensors, strided=("do", "q", "kv", "o", "dq", "dkv"))
    k, v = keys_values(samples_first, kv)
    return (*map(samples_first, (do, q)), k, v, *map(samples_first, (o, dq)), *keys_values(samples_first, dkv))


# -- flash-attn: FlashAttention-2 -------------------------------------------------------------------------------------


# Arguments that FlashAttention-2 wants spelled out: no dropout, mask, window, cap or bias.
_NO_EXTRAS: Mapping[str, Any] = {
    "dropout_p": 0.0,
    "causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}


def attention_2(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    package = import_module("flash_attn.flash_attn_interface")
    q, k, v, _ = _forward_views(inputs, outputs)
    scale = q.shape[-1] ** -0.5
    o, lse, *_ = package._flash_attn_forward(q, k, v, softmax_scale=scale, return_softmax=False, **_NO_EXTRAS)
    keep_outputs(samples_first, outputs, o, lse)


def attention_backward_2(inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, deterministic: bool = False) -> None:
    """As the reference, written in place."""
    package = import_module("flash_attn.flash_attn_interface")
    do, q, k, v, o, dq, dk, dv = _backward_views(inputs, outputs)
    package._flash_attn_backward(
        do,
        q,
        k,
        v,
        o,
        inputs[4],
        dq=dq,
        dk=dk,
        dv=dv,
        softmax_scale=q.shape[-1] ** -0.5,
        deterministic=deterministic,
        **_NO_EXTRAS,
    )


# -- flash_attn_3: FlashAttention-3 -----------------------------------------------------------------------------------


def attention_3(inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, sm_margin: int = 0) -> None:
    package = import_module("flash_attn_interface")
    q, k, v, _ = _forward_views(inputs, outputs)
    o, lse, *_ = package._flash_attn_forward(q, k, v, softmax_scale=q.shape[-1] ** -0.5, sm_margin=sm_margin)
    keep_outputs(samples_first, outputs, o, lse)


def attention_backward_3(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, sm_margin: int = 0, deterministic: bool = False
) -> None:
    """As the reference, written in place. ``sm_margin``: SMs that it leaves free."""
    package = import_module("flash_attn_interface")
    do, q, k, v, o, dq, dk, dv = _backward_views(inputs, outputs)
    scale = q.shape[-1] ** -0.5
    package._flash_attn_backward(
        do,
        q,
        k,
        v,
        o,
        inputs[4],
        dq=dq,
        dk=dk,
        dv=dv,
        softmax_scale=scale,
        deterministic=deterministic,
        sm_margin=sm_margin,
    )


# -- flash-attn-4: FlashAttention in CuTe -----------------------------------------------------------------------------


def attention_4(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    package = import_module("flash_attn.cute.interface")
    q, k, v, o = _forward_views(inputs, outputs)
    package._flash_attn_fwd(q, k, v, softmax_scale=q.shape[-1] ** -0.5, out=o, lse=outputs[1])


def attention_backward_4(inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, deterministic: bool = False) -> None:
    package = import_module("flash_attn.cute.interface")
    do, q, k, v, o, dq, dk, dv = _backward_views(inputs, outputs)
    scale = q.shape[-1] ** -0.5
    package._flash_attn_bwd(
        q, k, v, o, do, inputs[4], softmax_scale=scale, deterministic=deterministic, dq=dq, dk=dk, dv=dv
    )
