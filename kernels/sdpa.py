"""Attention on a CPU through torch's fused kernel: the reference's mathematics without the score matrix in memory.

``aten::_scaled_dot_product_flash_attention_for_cpu`` (torch 2.13) returns the log-sum-exp that a hand-written backward
needs. It allocates its outputs, which are then copied to ours; ``ops.py`` declares that workspace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .attention_views import heads_first, keep_gradients, keep_outputs, keys_values

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _additive(mask: list[Tensor], dtype: torch.dtype) -> Tensor | None:
    """Key mask [B, S] (True = valid) -> [B, 1, 1, S] of 0 and -inf."""
    if not mask:
        return None
    bias = torch.zeros(mask[0].shape, dtype=dtype).masked_fill_(mask[0].logical_not(), -math.inf)
    return bias[:, None, None, :]


def attention(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    q, kv, *mask = inputs
    k, v = keys_values(heads_first, kv)
    o, lse = _forward(heads_first(q), k, v, 0.0, False, attn_mask=_additive(mask, q.dtype))
    keep_outputs(heads_first, outputs, o, lse)


def attention_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """As the reference, from o and lse; torch gives new tensors, which are copied to the outputs."""
    do, q, kv, o, lse, *mask = inputs
    gradients = _backward(
        heads_first(do),
        heads_first(q),
        *keys_values(heads_first, kv),
        heads_first(o),
        lse.transpose(1, 2).contiguous().transpose(1, 2),
        0.0,
        False,
        attn_mask=_additive(mask, q.dtype),
    )
    keep_gradients(heads_first, outputs, *gradients)
