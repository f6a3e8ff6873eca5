"""Which bucket a step takes, and which samples of it: functions of seed and step alone, so that runs resume exactly.

step -> its bucket, drawn by Philox -> its place in that bucket's stream of epochs: what earlier steps took of it
     -> the next global batch there

Data ranks share out a global batch and are no part of it: with another number of them a run goes on with the same ones.

[Note: lanes] Places of a stream are dealt to as many lanes as a batch has samples, and each lane stays with one block
of neighbours until it has taken all of it: a rank, whose share of a batch is a run of lanes, reads whole blocks that it
alone needs, whatever the number of ranks; and a batch takes one sample of each of as many blocks as it has samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..kernels.philox import philox_words, uniform

# Philox purposes, disjoint from those of kernels.philox.Purpose
ORDER_PURPOSE = 7  # of a stream; the sample id is 0, or 1 + the block whose samples are mixed
BUCKET_PURPOSE = 8  # of the bucket of a step
BEGIN_PURPOSE = 9  # of where an epoch begins; the sample id is the bucket
READ_BYTES = 4 * 2**20  # of a block: ten thousand reads of a latent of 32 KB a second are no plan, of 4 MB some are
AT_ONCE = 2**14  # places, of a long stream, that are computed together: of few, all time is spent between tensors
AT_ONCE_LEAST = 2**12  # of a short one
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


def samples_of_a_read(sample_bytes: int) -> int:
    """Samples of a block that is worth a read of its own."""
    return math.ceil(READ_BYTES / sample_bytes)


@dataclass(frozen=True)
class Stream:
    """The samples 0 to ``size`` - 1 of one bucket, epoch after epoch, from epoch ``first_epoch`` on.

    An epoch takes every one of them once, in an order that depends on (seed, bucket, epoch) and the sizes here alone,
    and stands in no table: a keyed bijection of blocks of ``block`` neighbours, which are dealt to ``lanes``, and one
    of the samples within each block. The last block, where ``block`` does not divide ``size``, is shorter and stands
    behind the others; where an epoch begins is drawn, so it is not always the end. See [Note: lanes].
    """

    seed: int
    bucket: int
    size: int
    block: int = 1
    lanes: int = 1
    first_epoch: int = 0

    def __post_init__(self) -> None:
        assert self.size > 0 and self.block > 0 and self.lanes > 0
        assert self.bucket < 2**24 // FEISTEL_ROUNDS  # a counter's place has 24 bits

    def take(self, start: int, count: int) -> list[int]:
        """The ``count`` samples from place ``start`` of the stream on."""
        at_once = min(max(self.size, AT_ONCE_LEAST), AT_ONCE)
        taken: list[int] = []
        while len(taken) < count:
            number, begin = divmod(start + len(taken), at_once)
            taken += _taken_at_once(self, number, at_once)[begin : begin + count - len(taken)]
        return taken

    def samples(self, places: Tensor) -> list[int]:
        """The samples at these places of the stream, int64 [n]."""
        epoch = places // self.size + self.first_epoch
        place = (places + self._begin(epoch)) % self.size
        group = place // (self.lanes * self.block)
        within, blocks = place % (self.lanes * self.block), self._blocks_of(group)
        slot, turn = group * self.lanes + within % blocks, within // blocks
        inside = place < self.whole * self.block
        slots, of = (epoch * (self.whole + 1) + torch.where(inside, slot, 0)).unique(return_inverse=True)  # few of many
        moved = self._moved(slots // (self.whole + 1), slots % (self.whole + 1))
        block = torch.where(inside, moved[of], self.whole)
        turn = torch.where(inside, turn, place - self.whole * self.block)
        offset = self._permuted(epoch, 1 + block, turn, self._length(block))
        return (block * self.block + offset).tolist()

    def places(self, sample: int, until: int) -> list[int]:
        """The places before ``until`` at which the stream takes ``sample``, one an epoch: ``take`` undone."""
        epoch = torch.arange(-(-until // self.size)) + self.first_epoch
        block = torch.full_like(epoch, sample // self.block)
        turn = self._permuted(epoch, 1 + block, torch.full_like(epoch, sample % self.block), self._length(block), -1)
        inside = block < self.whole
        slot = self._moved(epoch, torch.where(inside, block, 0), -1)
        group = slot // self.lanes
        dealt = group * self.lanes * self.block + turn * self._blocks_of(group) + slot % self.lanes
        place = torch.where(inside, dealt, self.whole * self.block + turn)
        found = (place - self._begin(epoch)) % self.size + (epoch - self.first_epoch) * self.size
        return [at for at in found.tolist() if at < until]

    @property
    def whole(self) -> int:
        """Blocks that are not cut short."""
        return self.size // self.block

    def _blocks_of(self, group: Tensor) -> Tensor:
        return (self.whole - group * self.lanes).clamp(1, self.lanes)

    def _length(self, block: Tensor) -> Tensor:
        return (self.size - block * self.block).clamp(max=self.block)

    def _moved(self, epoch: Tensor, block: Tensor, way: int = 1) -> Tensor:
        """The block at a slot, or with ``way`` -1 the slot of a block."""
        return self._permuted(epoch, torch.zeros_like(block), block, torch.full_like(block, max(self.whole, 1)), way)

    def _permuted(self, epoch: Tensor, which: Tensor, value: Tensor, size: Tensor, way: int = 1) -> Tensor:
        """A bijection of 0 to ``size`` - 1 for every (epoch, which): a Feistel network, walked until it is inside.

        ``way`` -1 is its inverse.
        """
        sizes, of = size.unique(return_inverse=True)
        half = torch.tensor([max(1, (s - 1).bit_length() + 1 >> 1) for s in sizes.tolist()])[of]
        value, outside = value.clone(), torch.arange(len(value))
        while len(outside):  # few walk far
            walked = self._feistel(*(each[outside] for each in (epoch, which, value, half)), way)
            value[outside] = walked
            outside = outside[walked >= size[outside]]
        return value

    def _feistel(self, epoch: Tensor, which: Tensor, value: Tensor, half: Tensor, way: int) -> Tensor:
        """A bijection of numbers of twice ``half`` bits: each round adds to one half a function of the other."""
        mask = (1 << half) - 1
        left, right = value >> half, value & mask
        if way < 0:
            left, right = right, left
        for number in range(FEISTEL_ROUNDS)[::way]:
            place = torch.tensor(self.bucket * FEISTEL_ROUNDS + number)
            words = philox_words(self.seed, ORDER_PURPOSE, epoch, which, right, place)
            left, right = right, left ^ (words[0] & mask)
        if way < 0:
            left, right = right, left
        return left << half | right

    def _begin(self, epoch: Tensor) -> Tensor:
        """At which of its places an epoch begins."""
        words = philox_words(self.seed, BEGIN_PURPOSE, epoch, torch.tensor(self.bucket), torch.zeros_like(epoch))
        return (words[0] << 30 | words[1] >> 2) % self.size


@lru_cache(maxsize=16)  # each may be half a megabyte
def _taken_at_once(stream: Stream, number: int, count: int) -> list[int]:
    """The samples of ``count`` places, ``number`` * ``count`` on."""
    return stream.samples(torch.arange(number * count, (number + 1) * count))
