"""Adapters of NVIDIA's apex: fused RMSNorm and LayerNorm, and its multi-tensor Adam on the flat shard.

They call apex's compiled extensions, whose functions take positional arguments only. apex has no norm with a scale and
a shift per sample, so ``modulate_norm`` modulates in a second pass, and its backward (which also owes the gradients of
scale and shift) stays with the other packages. Source of the calls: NVIDIA/apex, csrc/layer_norm_cuda.cpp and
csrc/multi_tensor_adam.cu.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor

from .checks import check, labelled
from .reference import UPDATES, decay_boundary, ema_rate

ADAMW_MODE = 1  # decoupled weight decay
CHUNK = 2048 * 32  # elements of one thread block's work: apex's own default
STREAM = (torch.bfloat16, torch.float16, torch.float32)
STATISTICS = (torch.float32,)


def modulate_norm(inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, eps: float) -> None:
    """As the reference: apex normalises and applies the gain, torch the scale and the shift."""
    x, gain, scale, shift = inputs
    h, rstd = outputs
    names, dtypes = ("x", "gain", "scale", "shift", "h", "rstd"), {"x": STREAM, "rstd": STATISTICS}
    check("modulate_norm", labelled("modulate_norm", names, (*inputs, *outputs), dtypes, (x.dtype,)))
    normed, inverse = import_module("fused_layer_norm_cuda").rms_forward_affine(x, [x.shape[-1]], gain, eps)
    rstd.copy_(inverse.view(rstd.shape))
    torch.addcmul(shift, normed, 1 + scale, out=h)


def layer_norm(inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, eps: float) -> None:
    """As the reference; apex gives new tensors, which are copied to the outputs."""
    x, gain, bias = inputs
    y, mean, rstd = outputs
    names, dtypes = ("x", "gain", "bias", "y", "mean", "rstd"), {"x": STREAM, "mean": STATISTICS, "rstd": STATISTICS}
    check("layer_norm", labelled("layer_norm", names, (*inputs, *outputs), dtypes, (x.dtype,)))
    normed, center, inverse = import_module("fused_layer_norm_cuda").forward_affine(x, [x.shape[-1]], gain, bias, eps)
    y.copy_(normed)
    mean.copy_(center.view(mean.shape))
    rstd.copy_(inverse.view(rstd.shape))


def layer_norm_backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """As the reference, with dy rounded to the dtype of x, which is what apex takes."""
    dy, x, mean, rstd, gain = inputs
    dx, dgain, dbias = outputs
    names = ("dy", "x", "mean", "rstd", "gain", "dx", "dgain", "dbias")
    dtypes = dict.fromkeys(("dy", "x", "dx"), STREAM) | {"gain": (x.dtype,)}
    check("layer_norm_backward", labelled("layer_norm_backward", names, (*inputs, *outputs), dtypes, STATISTICS))
    # Without its memory-efficient mode apex takes from the bias its shape and dtype alone, and eps not at all.
    gradients = import_module("fused_layer_norm_cuda").backward_affine(
        dy.to(x.dtype), mean.view(-1), rstd.view(-1), x, [x.shape[-1]], gain, gain, 0.0, False
    )
    for out, gradient in zip((dx, dgain, dbias), gradients, strict=True):
        out.copy_(gradient)


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
    """As the reference. apex writes the clipped gradient over the gradient, whose last reader this op is."""
    master, exp_avg, exp_avg_sq, ema, gradient, clip, finite, counters, lr = inputs
    named = {"master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema, "gradient": gradient}
    check("adamw", {name: (x, "rn", STATISTICS) for name, x in named.items()})
    boundary = decay_boundary(**decay)
    skip = finite.logical_not().to(torch.int32).view(1)
    step = counters[UPDATES].clamp(min=1).to(torch.int32).view(1)
    kernel = import_module("amp_C").multi_tensor_adam_capturable
    flat = [x.view(-1) for x in (gradient, master, exp_avg, exp_avg_sq)]
    for rate, begin, end in ((weight_decay, 0, boundary), (0.0, boundary, flat[0].numel())):
        if begin < end:
            lists = [[x[begin:end]] for x in flat]
            kernel(CHUNK, skip, lists, lr, *betas, eps, step, ADAMW_MODE, 1, rate, clip)
    averaged = ema_rate(step.to(master.dtype), ema_decay)
    ema.lerp_(master, averaged.mul_(finite).view(()))
