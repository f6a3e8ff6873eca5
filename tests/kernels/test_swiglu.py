"""Triton's SwiGLU and its gradients against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from cinemesh.errors import CinemeshError
from cinemesh.kernels import swiglu as kernels

from .against_float64 import DTYPES, check, rand

pytestmark = pytest.mark.usefixtures("where_kernels_run")

SHAPES = [(1, 1, 1), (5, 1, 129), (123, 2, 5), (129, 3, 123)]  # the last is twelve programs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(
        "swiglu",
        kernels.swiglu,
        [rand(*shape, dtype=dtype) * 4, rand(*shape, dtype=dtype)],
        [rand(*shape, dtype=dtype)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    dy, gate, up = (rand(*shape, dtype=dtype) for _ in range(3))
    check("swiglu_backward", kernels.swiglu_backward, [dy, gate * 4, up], [gate, up])


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_far_gates_neither_overflow_nor_lose_their_sign() -> None:
    """exp(-gate) overflows fp32 at -89: silu is then -0, not NaN."""
    gate, up = torch.tensor([-200.0, -100.0, 100.0, 200.0]).view(4, 1, 1), torch.ones(4, 1, 1)
    y, dgate, dup = (torch.full_like(up, torch.nan) for _ in range(3))
    kernels.swiglu([gate, up], [y])
    kernels.swiglu_backward([up, gate, up], [dgate, dup])
    assert y.flatten().tolist() == [0.0, 0.0, 100.0, 200.0] == dup.flatten().tolist()
    assert dgate.flatten().tolist() == [0.0, 0.0, 1.0, 1.0]


def test_bad_input_is_named() -> None:
    x = rand(4, 1, 16)
    with pytest.raises(CinemeshError, match="swiglu: up: got 8 FFN width, wanted 16 as in gate"):
        kernels.swiglu([x, rand(4, 1, 8)], [x])
    with pytest.raises(CinemeshError, match="swiglu_backward: dy: got dtype float64, wanted bfloat16 or float32"):
        kernels.swiglu_backward([x.double(), x, x], [x, x])
