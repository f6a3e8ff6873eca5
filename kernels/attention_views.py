"""Attention's tensors as libraries want them: views in their layouts, nothing is transposed in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

View = Callable[[Tensor], Tensor]


def samples_first(x: Tensor) -> Tensor:
    """[T, B, H, K] as a view [B, T, H, K]."""
    return x.transpose(0, 1)


def heads_first(x: Tensor) -> Tensor:
    """[T, B, H, K] as a view [B, H, T, K]."""
    return x.permute(1, 2, 0, 3)


def keys_values(view: View, kv: Tensor) -> tuple[Tensor, Tensor]:
    """Both of [S, B, 2, H, K]."""
    return view(kv[:, :, 0]), view(kv[:, :, 1])


def keep_outputs(view: View, outputs: Sequence[Tensor], o: Tensor, lse: Tensor) -> None:
    """What a library allocated for o and log-sum-exp, copied into ours."""
    view(outputs[0]).copy_(o)
    outputs[1].copy_(lse)


def keep_gradients(view: View, outputs: Sequence[Tensor], *gradients: Tensor) -> None:
    """The same of dq, dk and dv."""
    for place, gradient in zip((view(outputs[0]), *keys_values(view, outputs[1])), gradients, strict=True):
        place.copy_(gradient)
