"""Torch's own CUDA kernels where the reference would do more than it must: products, sums of rows, and attention.

Attention without a key mask is FlashAttention-2 as torch ships it, or cuDNN's, with one the memory-efficient kernel
with a bias. All allocate their outputs, which are then copied into ours. The backwards sum in any order; those of
FlashAttention-2 and of the memory-efficient kernel in a fixed one if asked (``deterministic``), which torch does not
offer for cuDNN's. Operator signatures: torch 2.13; cuDNN's from 2.11 on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .attention_views import heads_first, keep_gradients, keep_outputs, keys_values, samples_first
from .reference import product_of, token_coordinates

_LSE_ALIGNMENT = 32  # queries; rows of the memory-efficient kernel's log-sum-exp are padded to it
_BIAS_ALIGNMENT = 8  # keys; rows of its bias must start at 16 bytes


def matmul(inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, signature: str, add: bool = False) -> None:
    """``out (+)= einsum(signature, a, b)``; an fp32 result of bf16 factors is written by the product itself."""
    a, b, target = product_of(signature, inputs[0], inputs[1], outputs[0])
    if a.dtype == target.dtype:
        target.addmm_(a, b) if add else torch.mm(a, b, out=target)
    elif add:
        torch.ops.aten.addmm.dtype_out(target, a, b, target.dtype, out=target)
    else:
        torch.ops.aten.mm.dtype_out(a, b, target.dtype, out=target)


def position_backward(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, grid: tuple[int, int, int], rank: int
) -> None:
    """The rows of each table as products: 1 where a token stands on the row, 0 elsewhere, times the gradient.

    So they are summed in one order. The reference adds by atomics on CUDA, and torch's switch would sort the tokens and
    copy the gradient.
    """
    gradient = inputs[0]
    tokens = gradient.shape[0]
    for table, index in zip(outputs, token_coordinates(rank * tokens, tokens, grid, gradient.device), strict=True):
        rows = torch.arange(table.shape[0], device=gradient.device)
        torch.mm((index == rows[:, None]).to(gradient.dtype), gradient, out=table)


@contextmanager
def _in_order(asked: bool) -> Iterator[None]:
    """Torch's attention backward looks at the global switch when it is launched; it ignores one that only warns.

    While that is on, torch would fill all that it allocates with NaN: a pass over memory more, for each of its outputs.
    """
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch._C._get_deterministic_fill_uninitialized_memory()
    if asked:
        torch.use_deterministic_algorithms(True)
        torch._C._set_deterministic_fill_uninitialized_memory(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        torch._C._set_deterministic_fill_uninitialized_memory(filled)


def attention(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    q, (k, v) = samples_first(inputs[0]), keys_values(samples_first, inputs[1])
    o, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, False, False)
    keep_outputs(samples_first, outputs, o, lse)


def attention_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, deterministic: bool = False) -> None:
    """As the reference, from o and lse; copied to the outputs."""
    do, q_rows, kv, o, lse = inputs
    q, (k, v) = samples_first(q_rows), keys_values(samples_first, kv)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a generator that no dropout asks
    with _in_order(deterministic):
        gradients = torch.ops.aten._flash_attention_backward(
            do.transpose(0, 1), q, k, v, o.transpose(0, 1), lse, None, None, q.shape[1], k.shape[1], 0.0, False,
            state, state[0],
        )  # fmt: skip
    keep_gradients(samples_first, outputs, *gradients)


def cudnn_attention(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """As the reference. Torch keeps cuDNN's plan by device, dtype, shapes and strides of q, k and v (MHA.cpp)."""
    q, (k, v) = heads_first(inputs[0]), keys_values(heads_first, inputs[1])
    o, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    keep_outputs(heads_first, outputs, o, lse.view_as(outputs[1]))  # [B, H, T] or, by torch's version, [B, H, T, 1]


def cudnn_attention_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """As the reference, from o and lse, with sums in any order; copied to the outputs.

    Torch keeps the plan as in forward: of calls with one layout of q, k and v, all have one of do and one of o, and the
    log-sum-exp, a slice of heads where K and V are gathered in slices, is in C order.
    """
    do, q_rows, kv, o, lse = inputs
    q, (k, v) = heads_first(q_rows), keys_values(heads_first, kv)
    nothing = torch.zeros((), dtype=torch.int64, device=q.device)  # seed and offset of a dropout that is not
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        heads_first(do), q, k, v, heads_first(o), lse.contiguous()[..., None], nothing, nothing, None, None, None,
        q.shape[2], k.shape[2], 0.0, False,
    )  # fmt: skip
    keep_gradients(heads_first, outputs, *gradients)


def cross_attention(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    q, (k, v) = heads_first(inputs[0]), keys_values(heads_first, inputs[1])
    o, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, _bias(inputs[2], q), True)
    keep_outputs(heads_first, outputs, o, lse[:, :, : q.shape[2]])


def cross_attention_backward(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, deterministic: bool = False
) -> None:
    """As the reference, from o and lse; copied to the outputs.

    The kernel reads o as [B, T, H, K] in C order, whatever its strides say: of several samples ours is not.
    """
    do, q_rows, kv, o, lse, mask = inputs
    q, (k, v) = heads_first(q_rows), keys_values(heads_first, kv)
    in_order = o.transpose(0, 1).contiguous().transpose(1, 2)
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % _LSE_ALIGNMENT), value=math.inf)
    nothing = torch.zeros((), dtype=torch.int64, device=q.device)  # seed and offset of a dropout that is not
    with _in_order(deterministic):
        *gradients, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            heads_first(do), q, k, v, _bias(mask, q), in_order, padded, nothing, nothing, 0.0, [True, True, True, False]
        )
    keep_gradients(heads_first, outputs, *gradients)


def _bias(mask: Tensor, q: Tensor) -> Tensor:
    """Key mask [B, S] (True = valid) -> [B, H, T, S] of 0 and -inf, every row the same memory, aligned."""
    samples, keys = mask.shape
    room = keys + -keys % _BIAS_ALIGNMENT
    bias = torch.zeros(samples, room, dtype=q.dtype, device=q.device)[:, :keys].masked_fill_(~mask, -math.inf)
    return bias[:, None, None, :].expand(samples, q.shape[1], q.shape[2], keys)
