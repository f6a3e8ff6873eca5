"""Triton's interpolation, velocity loss and its gradient against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from cinemesh.errors import CinemeshError
from cinemesh.kernels import velocity as kernels

from .against_float64 import DTYPES, check, rand

pytestmark = pytest.mark.usefixtures("where_kernels_run")

SHAPES = [(1, 1, 1), (5, 1, 129), (123, 2, 5), (129, 3, 123)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_interpolate(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x1, x0, t = rand(*shape), rand(*shape), torch.rand(shape[1])
    check("interpolate", kernels.interpolate, [x1, x0, t], [x1.to(dtype), x1], {"sigma_min": 1e-5})


@pytest.mark.parametrize("add", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss(shape: tuple[int, int, int], dtype: torch.dtype, add: bool) -> None:
    """The batch may have more elements than this rank."""
    attrs = {"elements": 6 * shape[0] * shape[1] * shape[2], "micro_batches": 3}
    check("velocity_loss", kernels.velocity_loss, [rand(*shape, dtype=dtype), rand(*shape)], [rand()], attrs, add=add)


def test_loss_in_more_than_one_round_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "flat_sums", lambda elements: 3)
    v, target = rand(60_001, 1, 1), rand(60_001, 1, 1)
    check("velocity_loss", kernels.velocity_loss, [v, target], [rand()], {"elements": 60_001, "micro_batches": 1})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    v, attrs = rand(*shape, dtype=dtype), {"elements": 1000, "micro_batches": 2}
    check("velocity_loss_backward", kernels.velocity_loss_backward, [v, rand(*shape)], [v], attrs)


def test_bad_input_is_named() -> None:
    x = rand(4, 1, 16)
    with pytest.raises(CinemeshError, match="interpolate: t: got 2 samples, wanted 1"):
        kernels.interpolate([x, x, rand(2)], [x, x], sigma_min=0.0)
    with pytest.raises(CinemeshError, match="velocity_loss: target: got dtype bfloat16, wanted float32"):
        kernels.velocity_loss([x, x.bfloat16()], [rand()], elements=1, micro_batches=1)
