"""Every op's plain-torch truth against the formula in its comment, differentiated by autograd, in float64.

The step is only as right as these: parity compares whole models on friendly shapes, this compares one op at a time on
shapes that no kernel likes. Outputs are poisoned first, so that an element that was not written shows; and what an
op allocates besides its outputs stays within what ``kernels/ops.py`` declares for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cinemesh.kernels.ops import OPS
from cinemesh.kernels.reference import REFERENCE, Kernel
from cinemesh.kernels.registry import kernels_for
from cinemesh.launch.proof.parity import OPTIMIZER, run_rank
from cinemesh.launch.proof.verify import small_case
from cinemesh.model.runner import StepRunner
from cinemesh.parallel.ir.plan import Plan

from .counting import allocated, operands_of
from .examples import EXAMPLES, UGLY, Example, rand

CHOSEN = kernels_for("cpu")


def poisoned(like: Tensor) -> Tensor:
    """Finite poison for integers and booleans, NaN for the rest."""
    if like.dtype.is_floating_point:
        return torch.full_like(like, torch.nan)
    return torch.full_like(like, 77) if like.dtype == torch.int64 else torch.ones_like(like)


def check(kind: str, example: Example, kernel: Kernel) -> None:
    outputs = [poisoned(x).contiguous() for x in example.wanted]
    inputs = [x.contiguous() for x in example.inputs]
    wanted, attrs = list(example.wanted), dict(example.attrs)
    for output, source in OPS[kind].in_place.items():
        outputs[output] = inputs[source] = inputs[source].clone()
    if example.add:
        so_far = torch.randn_like(wanted[0])
        outputs[0] = so_far.clone()
        wanted[0] = wanted[0] + so_far
        inputs.append(outputs[0])
        attrs["add"] = True
    only_read = {i: x.clone() for i, x in enumerate(inputs) if not any(x is y for y in outputs)}
    work = allocated(kernel, inputs, outputs, attrs)
    if kernel is CHOSEN[kind]:  # the reference's attention, which writes its scores down, is for comparison alone
        declared = OPS[kind].workspace(operands_of(kind, inputs, outputs, attrs))
        assert work <= declared, f"{work} B of workspace, {declared} B declared"
    for i, before in only_read.items():
        torch.testing.assert_close(inputs[i], before, rtol=0, atol=0, equal_nan=True, msg=f"input {i} was changed")
    for i, (got, want) in enumerate(zip(outputs, wanted, strict=True)):
        if want.dtype.is_floating_point:
            scale = max(want.abs().max().item(), 0.1)  # some gradients are zero, with one key for example
            # Rounding is 1e-16; a norm over one or two numbers divides by as little as sqrt(eps).
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10 * scale, msg=lambda m, i=i: f"output {i}: {m}")
        else:
            assert torch.equal(got, want), f"output {i}"


@pytest.mark.parametrize("shape", UGLY, ids=str)
@pytest.mark.parametrize("kind", EXAMPLES)
def test_reference_is_the_formula(kind: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(1)
    for example in EXAMPLES[kind](*shape):
        check(kind, example, REFERENCE[kind])


IN_CHUNKS_OF_THEIR_OWN = {"adamw", "draw_noise", "patchify", "unpatchify", "matmul"}  # shapes above are theirs


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from(sorted({*EXAMPLES} - IN_CHUNKS_OF_THEIR_OWN)),
)
def test_reference_is_the_formula_on_any_shape(t: int, b: int, d: int, kind: str) -> None:
    torch.manual_seed(t + b + d)
    for example in EXAMPLES[kind](t, b, d):
        check(kind, example, REFERENCE[kind])


FAST = {kind: kernel for kind, kernel in CHOSEN.items() if kernel is not REFERENCE[kind]}


@pytest.mark.parametrize("shape", [*UGLY, (7, 2, 1)], ids=str)  # the last: one key
@pytest.mark.parametrize("kind", FAST)
def test_what_the_registry_chose_is_the_formula_too(kind: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(2)
    for example in EXAMPLES[kind](*shape):
        check(kind, example, FAST[kind])


def test_attention_on_a_cpu_is_the_fused_one() -> None:
    assert set(FAST) == {"attention", "cross_attention", "attention_backward", "cross_attention_backward"}


def test_a_norm_that_is_not_finite_clips_nothing_and_counts_no_update() -> None:
    for bad in (math.nan, math.inf):
        squares = torch.tensor(bad, dtype=torch.float64)
        counters = torch.tensor([4, 2])
        norm, factor = poisoned(squares), poisoned(squares)
        finite = torch.tensor(True)
        REFERENCE["clip_factor"]([squares, counters], [norm, factor, finite, counters], clip_norm=0.5)
        assert not finite and counters.tolist() == [5, 2]


@pytest.mark.parametrize("updates", [0, 2])
def test_adamw_that_is_skipped_changes_nothing(updates: int) -> None:
    """Not even where the gradient is NaN, and not before the first update, whose bias correction would divide by 0."""
    states = [rand(1, 300) for _ in range(4)]
    states[2].square_()
    before = [x.clone() for x in states]
    gradient = torch.full((1, 300), torch.nan, dtype=torch.float64)
    bad, lr = torch.tensor(math.nan, dtype=torch.float64), torch.tensor(1e-2, dtype=torch.float64)
    counters = torch.tensor([3, updates])
    attrs = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "ema_decay": 0.9, "rank": 0}
    attrs |= {"last_offset": 100, "last_elements": 200, "last_decayed": 50}
    REFERENCE["adamw"]([*states, gradient, bad, torch.tensor(False), counters, lr], states, **attrs)
    assert all(torch.equal(x, y) for x, y in zip(states, before, strict=True))


# -- workspace, on the records of a real step -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "bf16"])
def test_no_record_allocates_more_than_it_declares(dtype: str) -> None:
    """With the dtypes that a plan mixes; memory planning reserves exactly what is declared."""
    case = small_case(Plan.parse("micro_batches=2", dtype=dtype), steps=1)
    excess: list[str] = []
    met: set[str] = set()

    def watched(kind: str) -> Kernel:
        def run(inputs: Sequence[Tensor], outputs: Sequence[Tensor], **attrs: Any) -> None:
            work = allocated(CHOSEN[kind], inputs, outputs, attrs)
            declared = OPS[kind].workspace(operands_of(kind, inputs, outputs, attrs))
            met.add(kind)
            if work > declared:
                excess.append(f"{kind} {attrs.get('signature', '')}: {work} > {declared} B")

        return run

    doors = {kind: watched(kind) for kind in CHOSEN}
    run_rank(
        case,
        None,
        StepRunner(case.config, case.plan, case.batch, OPTIMIZER, None, seed=case.seed, kernels=doors),
        watched=False,
    )
    assert not excess, "\n".join(excess)
    assert len(met) > 30
