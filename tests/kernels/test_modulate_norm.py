"""Triton's modulated RMSNorm, with and without the position in front, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from cinemesh.errors import CinemeshError
from cinemesh.kernels import modulate_norm as kernels
from cinemesh.kernels.tiles import norm_slices

from .against_float64 import DTYPES, UGLY, check, rand

pytestmark = pytest.mark.usefixtures("where_kernels_run")

EPS = 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", UGLY)
def test_forward(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    t, b, d = shape
    x, gain, scale, shift = (rand(*s, dtype=dtype) for s in ((t, b, d), (d,), (b, d), (b, d)))
    check("modulate_norm", kernels.modulate_norm, [x, gain, scale, shift], [x, rand(t, b)], {"eps": EPS})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", UGLY)
def test_position_forward(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Only here: the stream that is normed is the one that is stored, after its rounding."""
    t, b, d = shape
    x, position, gain, scale, shift = (rand(*s, dtype=dtype) for s in ((t, b, d), (t, d), (d,), (b, d), (b, d)))
    inputs = [x, position, gain, scale, shift]
    kernel = kernels.position_modulate_norm
    outputs = [x, x, rand(t, b)]
    x0, h, rstd = check("position_modulate_norm", kernel, inputs, outputs, {"eps": EPS}, rounded=(2,))
    alone = [torch.empty_like(h), torch.empty_like(rstd)]
    kernels.modulate_norm([x0, gain, scale, shift], alone, eps=EPS)
    assert torch.equal(h, alone[0]) and torch.equal(rstd, alone[1])


@pytest.mark.parametrize("add", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", UGLY)
def test_backward(shape: tuple[int, int, int], dtype: torch.dtype, add: bool) -> None:
    t, b, d = shape
    dy, x, gain, scale = (rand(*s, dtype=dtype) for s in ((t, b, d), (t, b, d), (d,), (b, d)))
    rstd = (x.double().pow(2).mean(-1) + EPS).rsqrt().float()
    outputs = [dy, rand(d), rand(b, d), rand(b, d)]
    check("modulate_norm_backward", kernels.modulate_norm_backward, [dy, x, rstd, gain, scale], outputs, add=add)


def test_every_slice_count_is_right() -> None:
    """A sample's tokens are cut into fewer slices than tokens, and into as many programs as an H100 has room for."""
    assert norm_slices(73728, 1) == 128 and norm_slices(4608, 1) == 64
    assert norm_slices(9216, 2) == 64 and norm_slices(1, 300) == 1
    t, b, d = 300, 1, 8
    dy, x, gain, scale = rand(t, b, d), rand(t, b, d), rand(d), rand(b, d)
    rstd = (x.double().pow(2).mean(-1) + EPS).rsqrt().float()
    outputs = [dy, rand(d), rand(b, d), rand(b, d)]
    check("modulate_norm_backward", kernels.modulate_norm_backward, [dy, x, rstd, gain, scale], outputs)


def test_bad_input_is_named() -> None:
    x, gain, scale, shift = rand(4, 1, 16), rand(16), rand(1, 16), rand(1, 16)
    h, rstd = torch.empty_like(x), rand(4, 1)
    with pytest.raises(CinemeshError, match="modulate_norm: x: got strides"):
        kernels.modulate_norm([rand(4, 1, 32)[..., ::2], gain, scale, shift], [h, rstd], eps=EPS)
    with pytest.raises(CinemeshError, match="modulate_norm: scale: got 8 width, wanted 16"):
        kernels.modulate_norm([x, gain, rand(1, 8), shift], [h, rstd], eps=EPS)
    with pytest.raises(CinemeshError, match="modulate_norm: rstd: got dtype bfloat16, wanted float32"):
        kernels.modulate_norm([x, gain, scale, shift], [h, rstd.bfloat16()], eps=EPS)
    with pytest.raises(CinemeshError, match="an address 4 bytes past"):
        kernels.modulate_norm([rand(65)[1:].view(4, 1, 16), gain, scale, shift], [h, rstd], eps=EPS)
    with pytest.raises(CinemeshError, match="at least one of tokens"):
        kernels.modulate_norm([rand(0, 1, 16), gain, scale, shift], [rand(0, 1, 16), rand(0, 1)], eps=EPS)
