"""How a Triton kernel is compared with the float64 reference: fresh inputs, poisoned outputs, two runs bit-equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cinemesh.kernels.ops import OPS
from cinemesh.kernels.reference import REFERENCE, Kernel

BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
DTYPES = tuple(BOUND)
UGLY = [(1, 1, 5), (5, 1, 129), (123, 1, 5), (9, 3, 123), (2, 1, 1024)]  # tokens, samples, width
"""One row, nothing that divides anything, and a shape that kernels like."""


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def poisoned(like: Tensor) -> Tensor:
    return torch.full_like(like, torch.nan if like.dtype.is_floating_point else 77)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest error over the largest wanted value; NaN is infinitely wrong."""
    error = (got.double() - want.double()).abs().max().item() / max(want.double().abs().max().item(), 1e-30)
    return error if error == error else float("inf")


def check(
    op: str,
    kernel: Kernel,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    attrs: dict[str, Any] | None = None,
    *,
    add: bool = False,
    exact: bool = False,
    rounded: tuple[int, ...] = (),
) -> list[Tensor]:
    """Run ``kernel`` on ``inputs``; ``outputs`` give shapes and dtypes. Returns what it wrote.

    The truth is the reference on the same inputs as float64. ``exact``: bit for bit the reference in their own dtype.
    ``rounded``: fp32 outputs that follow from a value that was rounded to the stream's dtype on the way.
    """
    attrs = attrs or {}
    wide = [x.double() if x.dtype.is_floating_point else x for x in inputs]
    start = [torch.randn(x.shape, dtype=torch.float64).to(x.dtype) for x in outputs[:1]] if add else []

    def run(function: Kernel, inputs: Sequence[Tensor], outputs: list[Tensor]) -> list[Tensor]:
        inputs = [x.clone() for x in inputs]
        for output, source in OPS[op].in_place.items():
            outputs[output] = inputs[source]
        extra: dict[str, Any] = {}
        if add:
            outputs[0] = start[0].to(outputs[0].dtype, copy=True)
            inputs, extra = [*inputs, outputs[0]], {"add": True}
        function(inputs, outputs, **attrs, **extra)
        return outputs

    def wider(x: Tensor) -> Tensor:
        return poisoned(x.double() if x.dtype.is_floating_point and not exact else x)

    want = run(REFERENCE[op], inputs if exact else wide, [wider(x) for x in outputs])
    got = run(kernel, inputs, [poisoned(x) for x in outputs])
    again = run(kernel, inputs, [poisoned(x) for x in outputs])
    for i, (first, second, truth) in enumerate(zip(got, again, want, strict=True)):
        assert torch.equal(first, second), f"{op}: output {i} differs between two runs"
        if exact or not truth.dtype.is_floating_point:
            assert torch.equal(first, truth), f"{op}: output {i} is not the reference's"
        else:
            error = relative_error(first, truth)
            bound = BOUND[inputs[0].dtype if i in rounded else first.dtype]
            assert error <= bound, f"{op}: output {i} of dtype {first.dtype} errs by {error:.2e}"
    return got
