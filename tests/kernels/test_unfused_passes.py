"""What an op moves as one kernel, against what the same formula moves as elementary torch operations.

``OpSpec.unfused_passes`` is data; here it is counted from outside, on what torch dispatches for the formula and for
what autograd makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cinemesh.kernels.ops import OPS
from cinemesh.kernels.reference import REFERENCE
from cinemesh.perf_model.prices.compute import REFERENCE as PRICES

T, B, D = 64, 1, 32


class Passes(TorchDispatchMode):
    """Counts the [T, B, D] tensors that operations read and write, by bytes of an element. Views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.found = {2: 0, 4: 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for x in (*args, *(out if isinstance(out, tuple) else (out,))):
                whole = isinstance(x, Tensor) and x.numel() == T * B * D and 0 not in x.stride()  # not an expanded row
                if whole:
                    self.found[x.element_size()] += 1
        return out

    @property
    def passes(self) -> tuple[int, int]:
        return self.found[2], self.found[4]


class Traffic(TorchDispatchMode):
    """Counts kernels, and the bytes that they read and write: the memory behind a view that repeats rows once."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket is not torch.ops.aten.empty:
            read = args[1:] if func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten.zero_) else args
            self.kernels += 1
            tensors = [x for x in (*read, out) if isinstance(x, Tensor)]
            self.bytes += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)
        return out


def modulated(x: Tensor, gain: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (normed * gain * (1 + scale) + shift).to(x.dtype)


STREAM, VECTOR, GAIN = (T, B, D), (B, D), (D,)
FORMULAS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "modulate_norm": (modulated, (STREAM, GAIN, VECTOR, VECTOR)),
    "gated_residual": (lambda x, y, gate: x + gate * y, (STREAM, STREAM, VECTOR)),
    "swiglu": (lambda gate, up: F.silu(gate) * up, (STREAM, STREAM)),
}


@pytest.mark.parametrize("op", FORMULAS)
def test_the_table_counts_what_torch_runs(op: str) -> None:
    formula, shapes = FORMULAS[op]
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    with Passes() as forward:
        out = formula(*inputs)
    gradient = torch.randn_like(out)
    with Passes() as backward:
        torch.autograd.grad(out, inputs, gradient)
    assert OPS[op].unfused_passes == forward.passes
    assert OPS[f"{op}_backward"].unfused_passes == backward.passes


@pytest.mark.parametrize("op", ["merge_attention", "sum_parts"])
def test_the_price_of_token_chunks_in_plain_torch(op: str) -> None:
    """Kernels and bytes of four parts in bf16; bytes over those of one kernel: parts read once, the whole written."""
    shape = (16, 1, 2, 128)
    parts = [torch.randn(shape).bfloat16() for _ in range(4)]
    inputs, outputs = parts, [torch.empty_like(parts[0])]
    if op == "merge_attention":
        inputs = [x for part in parts for x in (part, torch.randn(1, 2, 16))]
        outputs += [torch.empty(1, 2, 16)]
    with Traffic() as plain:
        REFERENCE[op](inputs, outputs, signature="")
    kernels, ratio = PRICES[op]
    assert plain.kernels == kernels
    assert plain.bytes == pytest.approx(ratio * sum(x.nbytes for x in (*inputs, *outputs)), rel=0.02)


def test_the_position_in_front_of_a_norm_is_one_addition_more() -> None:
    alone = OPS["modulate_norm"].unfused_passes
    assert alone is not None
    assert OPS["position_modulate_norm"].unfused_passes == (alone[0] + 3, alone[1])
