"""Counter-based randomness: Philox 4x32-10 and what is drawn from it.

Every random number of a run is a pure function of (seed, purpose, place, step, sample id, element), never of a
generator's state, so any shard draws exactly its slice and any plan sees the same noise. ``place`` is the sample's
index in the step's global batch, over its micro-batches and data ranks: a sample that occurs twice in a step draws
twice. What belongs to no batch (validation, sampling, initial weights) has place 0.

    key     = (seed low 32 bits, seed high 32 bits)
    counter = (element // 4, sample id, step, purpose + 256 * place);  word = element % 4

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11), constants and rounds of Philox 4x32-10.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

from .ops import PURPOSES

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
ROUNDS = 10


class Purpose(IntEnum):
    """The low byte of the counter's last word: two purposes never share a random number."""

    NOISE = 1  # x0 of training
    TIME = 2  # t of training
    CAPTION = 3  # caption dropout
    INIT = 4  # initial weights; the sample id is a hash of the parameter's name
    SAMPLING = 5  # x0 of the sampler
    PROBE = 6  # noise that `verify` adds to zero-initialised parameters


def _high_low(multiplier: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """The 64-bit product of two unsigned 32-bit numbers, as (high, low) words, in signed 64-bit arithmetic.

    Of a multiplier less by 2**32, which is negative, the product stays within 63 bits: 2**32 * value is added back.
    """
    product = value * (multiplier - (_MASK + 1))
    return (product >> 32) + value, product & _MASK


def philox_words(
    seed: int, purpose: int, step: Tensor, sample: Tensor, block: Tensor, place: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words in [0, 2**32) for each counter. ``step``, ``sample``, ``block`` are int64 and broadcast together.

    So does ``place``, below 2**24; None is 0.
    """
    assert 0 <= purpose < PURPOSES, f"purpose {purpose}: the counter has room for {PURPOSES}"
    c3 = torch.full_like(step, int(purpose)) if place is None else (place << 8) | int(purpose)
    c0, c1, c2, c3 = torch.broadcast_tensors(block & _MASK, sample & _MASK, step & _MASK, c3)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(ROUNDS):
        high0, low0 = _high_low(_MULTIPLIERS[0], c0)
        high1, low1 = _high_low(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _unit(word: Tensor) -> Tensor:
    """A 32-bit word as float64 in (0, 1): (word + 1/2) / 2**32, never 0 or 1."""
    return (word.to(torch.float64) + 0.5) * 2.0**-32


def uniform(
    seed: int, purpose: int, step: Tensor, sample: Tensor, element: Tensor, place: Tensor | None = None
) -> Tensor:
    """float64 in (0, 1); arguments as in :func:`normal`."""
    words = philox_words(seed, purpose, step, sample, element >> 2, place)
    lane = element & 3
    word = torch.where(
        lane < 2,
        torch.where(lane == 0, words[0], words[1]),
        torch.where(lane == 2, words[2], words[3]),
    )
    return _unit(word)


def _polar(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Radius and angle of Box-Muller, from two words."""
    return torch.sqrt(-2.0 * torch.log(_unit(first))), (2.0 * math.pi) * _unit(second)


def normal(
    seed: int, purpose: int, step: Tensor, sample: Tensor, element: Tensor, place: Tensor | None = None
) -> Tensor:
    """Standard normals, float64, by Box-Muller: words (0, 1) make elements 0 and 1 of a block, (2, 3) make 2 and 3.

    ``step``, ``sample``, ``element`` and ``place`` are int64 tensors that broadcast together. ``element`` is the
    C-order index in the whole (unsharded) tensor.
    """
    words = philox_words(seed, purpose, step, sample, element >> 2, place)
    second_pair = (element & 2) != 0
    radius, angle = _polar(*(torch.where(second_pair, words[2 + i], words[i]) for i in range(2)))
    return radius * torch.where((element & 1) != 0, torch.sin(angle), torch.cos(angle))


def normals(
    seed: int, purpose: int, step: Tensor, sample: Tensor, block: Tensor, place: Tensor | None = None
) -> Tensor:
    """The same of whole blocks, [..., 4]: an eighth of the work an element. ``block`` is the element's index // 4."""
    words = philox_words(seed, purpose, step, sample, block, place)
    polar = _polar(*words[:2]), _polar(*words[2:])
    return torch.stack([radius * turn(angle) for radius, angle in polar for turn in (torch.cos, torch.sin)], -1)
