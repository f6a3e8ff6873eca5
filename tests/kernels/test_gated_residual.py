"""Triton's gated residual and its gradients against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from cinemesh.errors import CinemeshError
from cinemesh.kernels import gated_residual as kernels

from .against_float64 import DTYPES, check, rand

pytestmark = pytest.mark.usefixtures("where_kernels_run")

SHAPES = [(1, 1, 1), (5, 1, 129), (123, 2, 5), (129, 3, 123), (2, 1, 2100)]
"""The last is three blocks of columns, the one before five programs of 32 tokens a sample."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    t, b, d = shape
    x, y, gate = rand(t, b, d, dtype=dtype), rand(t, b, d, dtype=dtype), rand(b, d, dtype=dtype)
    check("gated_residual", kernels.gated_residual, [x, y, gate], [x])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (700, 1, 3)])
def test_backward(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """700 tokens: every one of the 64 slices, some of which walk twice."""
    t, b, d = shape
    dout, y, gate = rand(t, b, d, dtype=dtype), rand(t, b, d, dtype=dtype), rand(b, d, dtype=dtype)
    check("gated_residual_backward", kernels.gated_residual_backward, [dout, y, gate], [y, rand(b, d)])


def test_bad_input_is_named() -> None:
    x, gate = rand(4, 1, 16), rand(1, 16)
    with pytest.raises(CinemeshError, match="gated_residual: gate: got 2 samples, wanted 1 as in x"):
        kernels.gated_residual([x, x, rand(2, 16)], [x])
    with pytest.raises(CinemeshError, match="gated_residual_backward: dgate: got dtype bfloat16, wanted float32"):
        kernels.gated_residual_backward([x, x, gate], [x, gate.bfloat16()])
