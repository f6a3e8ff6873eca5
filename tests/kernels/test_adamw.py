"""Triton's AdamW, EMA, bf16 copy and sum of squares against the float64 reference."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cinemesh.errors import CinemeshError
from cinemesh.kernels import adamw as kernels
from cinemesh.kernels import velocity

from .against_float64 import check, rand

pytestmark = pytest.mark.usefixtures("where_kernels_run")

RATES: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "ema_decay": 0.999}
WHOLE: dict[str, Any] = {"last_offset": 0, "last_elements": 10**9, "last_decayed": 10**9, "rank": 0}


def state(n: int, updates: int, finite: bool = True) -> list[Tensor]:
    master, m, ema, gradient = (rand(1, n) for _ in range(4))
    v = rand(1, n).square()
    scalars = [torch.tensor(0.37), torch.tensor(finite), torch.tensor([updates + 2, updates]), torch.tensor(1e-2)]
    return [master, m, v, ema, gradient, *scalars]


@pytest.mark.parametrize("updates", (1, 7, 100_000))
@pytest.mark.parametrize("n", (1, 5, 123, 129, 5000))
def test_update(n: int, updates: int) -> None:
    """Only here: the first update, whose correction 1 - 0.999 keeps three digits in fp32."""
    inputs = state(n, updates)
    check("adamw", kernels.adamw, inputs, inputs[:4], RATES | WHOLE)


@pytest.mark.parametrize(("rank", "decayed"), ((0, 90), (1, 80), (2, 40)))
def test_decay_ends_inside_the_last_unit(rank: int, decayed: int) -> None:
    """A unit of 40 elements before it decays whole; of the last unit's 150 over three ranks, the first 90 do."""
    inputs = state(90, 3)
    inputs[4].zero_()
    inputs[1].zero_()
    attrs = RATES | {"last_offset": 40, "last_elements": 50, "last_decayed": 90, "rank": rank}
    master, *_ = check("adamw", kernels.adamw, inputs, inputs[:4], attrs)
    assert (master != inputs[0]).sum() == decayed


@pytest.mark.parametrize("updates", (0, 4))
def test_a_skipped_update_changes_no_bit(updates: int) -> None:
    """Only here: a gradient that is not finite, and the first update ever being the one that is skipped."""
    inputs = state(130, updates, finite=False)
    inputs[4][0, 3], inputs[5] = torch.nan, torch.tensor(torch.nan)
    states = [x.clone() for x in inputs[:4]]
    kernels.adamw([*states, *inputs[4:]], states, **RATES, **WHOLE)
    for before, after in zip(inputs, states, strict=False):
        assert torch.equal(before, after)


def test_the_copy_is_the_new_weights_rounded() -> None:
    """The interpreter cuts bits off where a GPU rounds to nearest, so to one unit in bf16's last place."""
    inputs = state(3000, 2)
    alone, states = [x.clone() for x in inputs[:4]], [x.clone() for x in inputs[:4]]
    copy = torch.full((1, 3000), torch.nan, dtype=torch.bfloat16)
    kernels.adamw([*alone, *inputs[4:]], alone, **RATES, **WHOLE)
    kernels.adamw([*states, *inputs[4:]], [*states, copy], **RATES, **WHOLE)
    for a, b in zip(alone, states, strict=True):
        assert torch.equal(a, b)
    assert ((copy.float() - states[0]).abs() <= 2.0**-7 * states[0].abs()).all()


@pytest.mark.parametrize("n", (1, 5, 123, 129, 4097, 60_000))
def test_sum_of_squares(n: int) -> None:
    check("sum_of_squares", kernels.sum_of_squares, [rand(1, n)], [rand()])


def test_sum_of_squares_in_more_than_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "flat_sums", lambda elements: 3)
    check("sum_of_squares", kernels.sum_of_squares, [rand(1, 60_000)], [rand()])


def test_bad_input_is_named() -> None:
    inputs = state(16, 1)
    with pytest.raises(CinemeshError, match="adamw: gradient: got dtype bfloat16, wanted float32"):
        kernels.adamw([*inputs[:4], inputs[4].bfloat16(), *inputs[5:]], inputs[:4], **RATES, **WHOLE)
    with pytest.raises(CinemeshError, match=r"sum_of_squares: x: got shape .* at least one of elements"):
        kernels.sum_of_squares([rand(1, 0)], [rand()])


@pytest.mark.parametrize("kernel", [kernels.squares_kernel, velocity.loss_kernel])
def test_sizes_just_below_2_to_the_31_have_all_their_blocks(kernel: Any) -> None:
    """Such a size is an int32, and rounding up by an addition wraps: no block was summed, and a norm was 0."""
    source = inspect.getsource(kernel.fn)
    (line,) = (line for line in source.splitlines() if line.strip().startswith("blocks ="))
    expression = line.partition("=")[2].partition("#")[0]
    elements, block = np.int32(2**31 - 5), np.int32(4096)
    with np.errstate(over="raise"):
        assert eval(expression, {"elements": elements, "BLOCK": block}) == 2**31 // 4096
        with pytest.raises(FloatingPointError):
            _ = (elements + (block - np.int32(1))) // block
    assert "cdiv(" not in source
