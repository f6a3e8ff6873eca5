"""Which bucket a step takes, and which samples of it: functions of seed and step alone, so that runs resume exactly.

step -> its bucket, drawn by Philox -> its place in that bucket's stream of epochs: what earlier steps took of it
     -> the next global batch there

Data ranks share out a global batch and are no part of it: with another number of them a run goes on with the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.philox import philox_words, uniform

# Philox purposes, disjoint from those of kernels.philox.Purpose
ORDER_PURPOSE = 7  # of a stream; the sample id is the bucket
BUCKET_PURPOSE = 8  # of the bucket of a step
SHIFT_PURPOSE = 9  # of where an epoch's blocks begin; the sample id is the bucket
READ_BYTES = 4 * 2**20  # of a block: ten thousand reads of a latent of 32 KB a second are no plan, of 4 MB some are
GROUP = 64  # blocks whose samples are mixed: 256 MB
FEISTEL_ROUNDS = 8  # Luby and Rackoff prove four of random functions; domains of a few samples need more to look random


def drawn_buckets(seed: int, steps: int, weights: Sequence[float]) -> Tensor:
    """The bucket of each step from 0 to ``steps`` - 1, int64 [steps].

    Every step draws bucket i with probability ``weights[i]`` / their sum, by itself: the beginning does not depend on
    how many steps there are.
    """
    zero = torch.tensor(0)
    drawn = uniform(seed, BUCKET_PURPOSE, torch.arange(steps), zero, zero)
    upper = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    return torch.searchsorted(upper[:-1] / upper[-1], drawn, right=True)


def balanced(scenes: Sequence[str], balance: float) -> list[int]:
    """Indices of samples of which an epoch is made; ``scenes`` names the scene of each sample.

    With ``balance`` 0, every sample once. With 1, every scene as often as the largest has samples: those of a short
    scene are repeated, evenly. Between, the largest n_max and a scene of n give n_max * (n / n_max) ** (1 - balance).
    """
    groups: dict[str, list[int]] = {}
    for index, scene in enumerate(scenes):
        groups.setdefault(scene, []).append(index)
    most = max(map(len, groups.values()), default=0)
    counts = {scene: round(most * (len(group) / most) ** (1 - balance)) for scene, group in groups.items()}
    return [group[place % len(group)] for scene, group in groups.items() for place in range(counts[scene])]


def samples_of_a_read(sample_bytes: int) -> int:
    """Samples of a block that is worth a read of its own."""
    return math.ceil(READ_BYTES / sample_bytes)


class Stream:
    """The samples of one bucket, epoch after epoch.

    An epoch takes every one of ``samples`` once, in an order that depends on (seed, bucket, epoch) alone and stands in
    no table: a keyed bijection of blocks of ``block`` neighbours, which are read at once, and one of the samples of
    every GROUP blocks. Of the samples, a reader needs those of one group at a time.
    """

    def __init__(self, seed: int, bucket: int, samples: Sequence[int], block: int = 1) -> None:
        most_groups = 2**24 // FEISTEL_ROUNDS - 1  # a counter's place has 24 bits
        assert block > 0 and len(samples) <= most_groups * GROUP * block
        self._seed, self._bucket, self._samples, self._block = seed, bucket, samples, block

    def take(self, start: int, count: int) -> list[int]:
        """The ``count`` samples from place ``start`` of the stream on."""
        size = len(self._samples)
        places = torch.arange(start, start + count)
        epoch, place = places // size, places % size
        return [self._samples[index] for index in self._indices(epoch, place).tolist()]

    def _indices(self, epoch: Tensor, place: Tensor) -> Tensor:
        """Which samples stand at ``place`` of ``epoch``, both int64 [n]."""
        size, block, group = len(self._samples), self._block, GROUP * self._block
        number = place // group
        within = self._permuted(epoch, number + 1, place % group, (size - number * group).clamp(max=group))
        slot, offset = number * GROUP + within // block, within % block
        whole = torch.full_like(slot, size // block)  # blocks; what is left stands last, at another place every epoch
        some = whole.clamp(min=1)
        moved = torch.where(slot < whole, self._permuted(epoch, torch.zeros_like(slot), slot % some, some), slot)
        return (moved * block + offset + self._shift(epoch)) % size

    def _permuted(self, epoch: Tensor, which: Tensor, value: Tensor, size: Tensor) -> Tensor:
        """A bijection of 0 to ``size`` - 1 for every (epoch, which): a Feistel network, walked until it is inside."""
        half = torch.tensor([max(1, (s - 1).bit_length() + 1 >> 1) for s in size.tolist()])
        inside = torch.zeros_like(value, dtype=torch.bool)
        while not inside.all():
            walked = self._feistel(epoch, which, value, half)
            value = torch.where(inside, value, walked)
            inside |= value < size
        return value

    def _feistel(self, epoch: Tensor, which: Tensor, value: Tensor, half: Tensor) -> Tensor:
        """A bijection of numbers of twice ``half`` bits: each round adds to one half a function of the other."""
        mask = (1 << half) - 1
        left, right = value >> half, value & mask
        for number in range(FEISTEL_ROUNDS):
            place = which * FEISTEL_ROUNDS + number
            words = philox_words(self._seed, ORDER_PURPOSE, epoch, torch.tensor(self._bucket), right, place)
            left, right = right, left ^ (words[0] & mask)
        return left << half | right

    def _shift(self, epoch: Tensor) -> Tensor:
        """Where an epoch's first block begins: no border of blocks is always the same, nor what the last one holds."""
        zero = torch.zeros_like(epoch)
        words = philox_words(self._seed, SHIFT_PURPOSE, epoch, torch.tensor(self._bucket), zero)
        return (words[0] << 30 | words[1] >> 2) % len(self._samples)
