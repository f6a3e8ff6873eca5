"""Triton's Philox: the reference's integers exactly, its normals to the rounding of the output."""

from __future__ import annotations

import pytest
import torch

from cinemesh.errors import CinemeshError
from cinemesh.kernels import noise as kernels
from cinemesh.kernels.philox import Purpose, philox_words
from cinemesh.kernels.reference import draw_noise

from .against_float64 import rand

pytestmark = pytest.mark.usefixtures("where_kernels_run")

SEEDS = (0, 3, (7 << 32) + 3, (1 << 64) - 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_integers_are_the_references(seed: int) -> None:
    """Every word of the counter reaches the rounds: elements, samples and steps beyond 32 bits too."""
    element = torch.cat((torch.arange(1000), torch.randint(1 << 62, (1100,)), (1 << 34) - 1 + torch.arange(3)))
    drawn = ((Purpose.NOISE, 0, 0, 0), (Purpose.SAMPLING, (1 << 40) + 5, (1 << 33) + 77, (1 << 24) - 1))
    for purpose, *counter in drawn:
        step, sample, place = map(torch.tensor, counter)
        want = torch.stack(philox_words(seed, purpose, step, sample, element >> 2, place), -1)
        want = want.gather(-1, (element & 3)[:, None]).squeeze(-1)
        assert torch.equal(kernels.words(seed, purpose, step, sample, element, place), want)


CASES = [
    ((4, 3, 4, 6), (1, 2, 2), (1, 2, 9)),
    ((3, 4, 6, 10), (2, 3, 5), (1, 2)),
    ((16, 1, 8, 34), (1, 2, 2), (4,)),
]


@pytest.mark.parametrize("batch", (1, 3))
@pytest.mark.parametrize(("latent", "patch", "splits"), CASES)
def test_noise(
    latent: tuple[int, int, int, int], patch: tuple[int, int, int], splits: tuple[int, ...], batch: int
) -> None:
    """Both sides work in fp64, which leaves three errors, and their sum is the bound.

    - one rounding to fp32: 2^-24 of the value;
    - the Taylor sums: what they leave out is below (pi/4)^14 / 14! / cos(pi/4) = 5.5e-13 of the value;
    - the reference's angle 2 pi u, rounded to fp64 near 2 pi: 2^-51 and as much for its constant, times a radius of at
      most sqrt(-2 log 2^-33) = 6.8: 6.1e-15 in all, whatever the value.
    """
    places, counters = torch.randperm(1 << 10)[:batch] << 14, torch.tensor([5, 3])
    ids = torch.randint(1 << 40, (1,)).expand(batch).contiguous()  # one sample, drawn for in each of its places
    tokens = latent[1] * latent[2] * latent[3] // (patch[0] * patch[1] * patch[2])
    values = latent[0] * patch[0] * patch[1] * patch[2]
    attrs = {"seed": SEEDS[2], "patch": patch, "latent": latent}
    for ranks in splits:
        for rank in range(ranks):
            shape = (tokens // ranks, batch, values)
            want = torch.empty(shape, dtype=torch.float64)
            draw_noise([ids, places, counters], [want], **attrs, rank=rank)
            got, again = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
            kernels.draw_noise([ids, places, counters], [got], **attrs, rank=rank)
            kernels.draw_noise([ids, places, counters], [again], **attrs, rank=rank)
            bound = want.abs() * (2.0**-24 + 1e-12) + 1e-14
            assert ((got.double() - want).abs() <= bound).all() and torch.equal(got, again)


def test_bad_input_is_named() -> None:
    attrs = {"seed": 1, "patch": (1, 2, 2), "latent": (4, 1, 2, 4), "rank": 0}
    with pytest.raises(CinemeshError, match="draw_noise: ids: got dtype float32, wanted int64"):
        kernels.draw_noise([rand(1), torch.tensor([0]), torch.tensor([1, 1])], [rand(2, 1, 16)], **attrs)
    with pytest.raises(CinemeshError, match="draw_noise: places: got dtype float32, wanted int64"):
        kernels.draw_noise([torch.tensor([0]), rand(1), torch.tensor([1, 1])], [rand(2, 1, 16)], **attrs)
