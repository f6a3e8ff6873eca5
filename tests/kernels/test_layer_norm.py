"""Triton's LayerNorm against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from cinemesh.errors import CinemeshError
from cinemesh.kernels import layer_norm as kernels

from .against_float64 import DTYPES, UGLY, check, rand

pytestmark = pytest.mark.usefixtures("where_kernels_run")

EPS = 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", UGLY)
def test_forward(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    l, b, d = shape  # noqa: E741
    x, gain, bias = rand(l, b, d, dtype=dtype) + 3, rand(d, dtype=dtype), rand(d, dtype=dtype)
    check("layer_norm", kernels.layer_norm, [x, gain, bias], [x, rand(l, b), rand(l, b)], {"eps": EPS})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", UGLY)
def test_backward(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Gradients of the text come in fp32 whatever x is. 123 rows make two slices; fewer write their sums at once."""
    l, b, d = shape  # noqa: E741
    dy, x, gain = rand(l, b, d), rand(l, b, d, dtype=dtype) + 3, rand(d, dtype=dtype)
    mean = x.double().mean(-1).float()
    rstd = (x.double().var(-1, correction=0) + EPS).rsqrt().float()
    check("layer_norm_backward", kernels.layer_norm_backward, [dy, x, mean, rstd, gain], [x, rand(d), rand(d)])


def test_bad_input_is_named() -> None:
    x, gain, row = rand(4, 1, 16), rand(16), rand(4, 1)
    with pytest.raises(CinemeshError, match="layer_norm: bias: got dtype float64, wanted bfloat16 or float32"):
        kernels.layer_norm([x, gain, gain.double()], [x, row, row], eps=EPS)
    with pytest.raises(CinemeshError, match="layer_norm_backward: rstd: got 3 text tokens, wanted 4"):
        kernels.layer_norm_backward([x, x, row, rand(3, 1), gain], [x, gain, gain])
