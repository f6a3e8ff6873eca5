"""Policy bf16, one op at a time: what is fp32 is computed in fp32, and what is bf16 is rounded once, at its end.

Bounds of whole steps cannot see a statistic, a sum or a log-sum-exp that is computed in bf16 and then widened; here
each op is compared with itself in float64, on the same rounded inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cinemesh.kernels.ops import OPS
from cinemesh.kernels.reference import REFERENCE, Kernel
from cinemesh.kernels.registry import kernels_for

from .examples import EXAMPLES, Example

DTYPES = {"c": torch.bfloat16, "s": torch.float32, "i": torch.int64, "b": torch.bool}  # the letters of Example.dtypes
ROUNDING = 2.0**-8  # of a bf16 value: 8 significant bits
EXACT = 1e-6  # fp32 sums of some hundred terms, relative to the largest result; 2**-24 is 6e-8
SHAPES = [(123, 2, 5), (64, 2, 96)]  # tokens, samples, width
CHOSEN = kernels_for("cpu")

# Outputs that are rounded more often on their way, in roundings of the LARGEST value, and why.
OFTEN: dict[tuple[str, int], tuple[float, str]] = {
    ("modulate_norm", 0): (3, "gain * (1 + scale) is formed in the weights' dtype"),
    ("position_modulate_norm", 1): (3, "as modulate_norm"),
    ("position", 0): (2, "three tables are added one after the other"),
    ("swiglu", 0): (2, "silu(gate) is stored before it is multiplied"),
    ("swiglu_backward", 0): (2, "dy * up is stored before silu' is applied"),
    ("swiglu_backward", 1): (2, "silu(gate) is stored before it is multiplied"),
}
# Torch's fused CPU kernel multiplies V by softmax weights that it rounds to bf16; its sums are fp32.
FUSED = 4.0
FUSED_LSE = 1e-5  # its exp is a polynomial


def run(kind: str, kernel: Kernel, example: Example) -> list[tuple[Tensor, Tensor]]:
    """(got, wanted in float64) of every output, from the example's inputs in the dtypes of a bf16 step."""
    into, out_of = example.dtypes.split("->")
    inputs = [x.to(DTYPES[letter]) for x, letter in zip(example.inputs, into, strict=True)]
    wide = [x.double() if x.is_floating_point() else x.clone() for x in inputs]
    got = [torch.zeros(x.shape, dtype=DTYPES[letter]) for x, letter in zip(example.wanted, out_of, strict=True)]
    want = [torch.zeros_like(x) for x in example.wanted]
    attrs = dict(example.attrs)
    for output, source in OPS[kind].in_place.items():
        got[output], want[output] = inputs[source], wide[source]
    if example.add:
        got[0] = torch.randn(got[0].shape, dtype=torch.float64).to(got[0].dtype)
        want[0] = got[0].double()
        inputs, wide, attrs["add"] = [*inputs, got[0]], [*wide, want[0]], True
    REFERENCE[kind](wide, want, **attrs)
    kernel(inputs, got, **attrs)
    if kind == "position_modulate_norm":  # of x0 as it is stored
        REFERENCE["modulate_norm"]([got[0].double(), *wide[2:]], want[1:], **attrs)
    return list(zip(got, want, strict=True))


def excess(kind: str, kernel: Kernel, example: Example, *, fused: bool = False) -> list[str]:
    """What errs by more than the policy allows. ``fused``: by torch's CPU attention."""
    found: list[str] = []
    for i, (got, want) in enumerate(run(kind, kernel, example)):
        if not want.is_floating_point():
            assert torch.equal(got, want)
            continue
        largest = max(want.abs().max().item(), 0.1)
        if got.dtype == torch.float32:
            bound = torch.tensor((FUSED_LSE if fused else EXACT) * largest)
        elif fused or (kind, i) in OFTEN:
            times = FUSED if fused else OFTEN[kind, i][0]
            bound = torch.tensor(times * ROUNDING * largest)
        elif kind == "time_features":  # the angle, up to 1000 radians, is fp32
            bound = ROUNDING * want.abs() + 1000 * 2.0**-22
        else:
            bound = ROUNDING * want.abs() + EXACT * largest
        over = ((got.double() - want).abs() / bound).max().item()
        if not over <= 1:
            found.append(f"{kind}: output {i}, {got.dtype}: {over:.1f} times its bound")
    return found


KERNELS = [("reference", kind, REFERENCE[kind]) for kind in EXAMPLES]
KERNELS += [("chosen", kind, CHOSEN[kind]) for kind in EXAMPLES if CHOSEN[kind] is not REFERENCE[kind]]


@pytest.mark.parametrize(("kind", "kernel"), [k[1:] for k in KERNELS], ids=[f"{k[1]}-{k[0]}" for k in KERNELS])
def test_every_output_is_as_exact_as_its_dtype(kind: str, kernel: Kernel) -> None:
    torch.manual_seed(0)
    fused = kernel is not REFERENCE[kind]
    examples = [example for shape in SHAPES for example in EXAMPLES[kind](*shape)]
    assert [line for example in examples for line in excess(kind, kernel, example, fused=fused)] == []


def in_bf16(kind: str) -> Callable[..., None]:
    """The op with everything in bf16, widened at the end: the fault that dtypes of buffers do not show."""

    def kernel(inputs: Sequence[Tensor], outputs: Sequence[Tensor], **attrs: Any) -> None:
        narrow = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
        found = [torch.empty_like(x, dtype=torch.bfloat16) if x.is_floating_point() else x for x in outputs]
        for output, source in OPS[kind].in_place.items():
            found[output] = narrow[source]
        if attrs.get("add"):
            found[0] = narrow[-1]
        REFERENCE[kind](narrow, found, **attrs)
        for output, value in zip(outputs, found, strict=True):
            output.copy_(value)

    return kernel


STATISTICS = [kind for kind in EXAMPLES if "s" in next(EXAMPLES[kind](2, 1, 2)).dtypes.split("->")[1]]


@pytest.mark.parametrize("kind", sorted({*STATISTICS} - {"patchify", "copy", "zero_gaps"}))  # which only move values
def test_a_statistic_in_bf16_is_found(kind: str) -> None:
    torch.manual_seed(0)
    assert any(excess(kind, in_bf16(kind), example) for example in EXAMPLES[kind](*SHAPES[1]))
