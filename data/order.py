"""Which bucket a step takes, and which samples of it: functions of seed and step alone, so that runs resume exactly.

step -> its bucket, drawn by Philox -> its turn: how many earlier steps drew that bucket
     -> the next global batch of that bucket's stream of epochs
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from ..kernels.philox import philox_words, uniform

# Philox purposes, disjoint from those of kernels.philox.Purpose
ORDER_PURPOSE = 7  # of a stream; the sample id is the bucket
BUCKET_PURPOSE = 8  # of the bucket of a step


def turns(seed: int, steps: int, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The bucket of each step from 0 to ``steps`` - 1, and its turn: how many steps before it drew that bucket.

    Two int64 [steps]. Every step draws bucket i with probability ``weights[i]`` / their sum, by itself: the beginning
    does not depend on how many steps there are.
    """
    zero = torch.tensor(0)
    drawn = uniform(seed, BUCKET_PURPOSE, torch.arange(steps), zero, zero)
    upper = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    buckets = torch.searchsorted(upper[:-1] / upper[-1], drawn, right=True)
    turn = torch.empty_like(buckets)
    for bucket in range(len(weights)):
        mine = buckets == bucket
        turn[mine] = torch.arange(int(mine.sum()))
    return buckets, turn


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


class Stream:
    """The samples of one bucket, epoch after epoch.

    An epoch is a permutation of all of ``samples`` that depends on (seed, bucket, epoch) alone: within one, no sample
    repeats.
    """

    def __init__(self, seed: int, bucket: int, samples: Sequence[int]) -> None:
        self._samples = samples
        permutation = partial(_permutation, seed, bucket, len(samples))
        self._permutation = lru_cache(maxsize=2)(permutation)  # a batch may span two epochs

    def take(self, start: int, count: int) -> list[int]:
        """The ``count`` samples from place ``start`` of the stream on."""
        size = len(self._samples)
        places = range(start, start + count)
        return [self._samples[self._permutation(place // size)[place % size]] for place in places]


def _permutation(seed: int, bucket: int, size: int, epoch: int) -> list[int]:
    """Indices sorted by a 62-bit Philox key each; stable, so equal keys too have one order."""
    words = philox_words(seed, ORDER_PURPOSE, torch.tensor(epoch), torch.tensor(bucket), torch.arange(size))
    keys = ((words[0] >> 1) << 31) | (words[1] >> 1)
    return torch.sort(keys, stable=True).indices.tolist()
