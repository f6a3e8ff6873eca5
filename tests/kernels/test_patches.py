"""Triton's patchify and un-patchify: the reference's values, bit for bit."""

from __future__ import annotations

import pytest
import torch

from cinemesh.errors import CinemeshError
from cinemesh.kernels import patches as kernels

from .against_float64 import check, rand

pytestmark = pytest.mark.usefixtures("where_kernels_run")

CASES = [
    ((4, 3, 4, 6), (1, 2, 2)),  # C, T, H, W and patch
    ((3, 4, 6, 10), (2, 3, 5)),  # nothing is a power of two
    ((16, 1, 4, 80), (1, 2, 2)),  # three programs a row of the grid
    ((1, 1, 1, 1), (1, 1, 1)),
]


@pytest.mark.parametrize("batch", (1, 3))
@pytest.mark.parametrize(("latent", "patch"), CASES)
def test_patchify(latent: tuple[int, int, int, int], patch: tuple[int, int, int], batch: int) -> None:
    """Every rank's tokens, for ranks that hold whole rows of the grid and ranks that split them."""
    c, t, h, w = latent
    tokens, values = t * h * w // (patch[0] * patch[1] * patch[2]), c * patch[0] * patch[1] * patch[2]
    for ranks in (n for n in (1, 2, 9) if tokens % n == 0):
        for rank in range(ranks):
            out, attrs = rand(tokens // ranks, batch, values), {"patch": patch, "latent": latent, "rank": rank}
            check("patchify", kernels.patchify, [rand(batch, *latent)], [out], attrs, exact=True)


@pytest.mark.parametrize("batch", (1, 3))
@pytest.mark.parametrize(("latent", "patch"), CASES)
def test_unpatchify(latent: tuple[int, int, int, int], patch: tuple[int, int, int], batch: int) -> None:
    c, t, h, w = latent
    kt, kh, kw = patch
    tokens = rand(t * h * w // (kt * kh * kw), batch, c * kt * kh * kw, dtype=torch.bfloat16)
    attrs = {"patch": patch, "grid": (t // kt, h // kh, w // kw)}
    out = torch.empty(batch, *latent, dtype=torch.bfloat16)
    check("unpatchify", kernels.unpatchify, [tokens], [out], attrs, exact=True)


def test_bad_input_is_named() -> None:
    attrs = {"patch": (1, 2, 2), "latent": (4, 1, 2, 4), "rank": 0}
    with pytest.raises(CinemeshError, match="patchify: tokens: got dtype int64, wanted float32 or bfloat16"):
        kernels.patchify([rand(1, 4, 1, 2, 4)], [torch.zeros(2, 1, 16, dtype=torch.int64)], **attrs)
