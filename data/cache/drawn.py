"""The samples of every step of a run, over the versions that it draws from; and the steps of a sample.

A function of what stands in ``RunOrder`` and of the number of rows in each version, whatever the data ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from ..batches import BatchHistory
from ..order import Stream, drawn_buckets, samples_of_a_read
from .history import History
from .samples import Samples


@dataclass(frozen=True)
class RunOrder:
    """What decides it, of a run: ``weights`` of the buckets, and how many samples its steps have."""

    seed: int
    steps: int
    weights: tuple[float, ...]
    batches: BatchHistory


@dataclass(frozen=True)
class Epochs:
    """Of one bucket, while a run draws from one version; steps before took ``begin`` samples of the bucket."""

    train: Samples
    stream: Stream
    begin: int


class Drawn:
    """Steps count from 0."""

    def __init__(self, order: RunOrder, history: History) -> None:
        self.order, self.history = order, history
        self.bucket: list[int] = drawn_buckets(order.seed, order.steps, order.weights).tolist()  # of every step
        self.places = order.batches.places(self.bucket)  # of every step: what those before took of its bucket
        self._begins = [draws.step for draws in history.draws]
        self.epochs: list[list[Epochs]] = []  # of every version, of every bucket
        for draws in history.draws:
            before = self.epochs[-1] if self.epochs else None
            self.epochs.append([
                self._of(bucket, windows.train, draws.step, before[bucket] if before else None)
                for bucket, windows in enumerate(draws.cache.buckets)
            ])  # fmt: skip

    def _of(self, bucket: int, train: Samples, step: int, before: Epochs | None) -> Epochs:
        """Epochs count on over versions: a new one begins with an epoch of its own."""
        taken, first = self.order.batches.taken(self.bucket[:step])[bucket], 0
        if before is not None:
            first = before.stream.first_epoch + -(-(taken - before.begin) // before.stream.size)
        block, lanes = samples_of_a_read(train.latent_bytes), self.order.batches.at(0)[bucket]
        return Epochs(train, Stream(self.order.seed, bucket, len(train), block, lanes, first), taken)

    def size(self, step: int) -> int:
        """Samples of a step's whole global batch."""
        return self.order.batches.at(step)[self.bucket[step]]

    def at(self, step: int) -> Epochs:
        return self.epochs[bisect_right(self._begins, step) - 1][self.bucket[step]]

    def indices(self, step: int) -> list[int]:
        """Of the samples of a step's whole global batch, among its version's of the bucket."""
        epochs = self.at(step)
        return epochs.stream.take(self.places[step] - epochs.begin, self.size(step))

    def steps_of(self, version: int, bucket: int, indices: Sequence[int], before: int) -> list[int]:
        """Steps below ``before`` that draw one of these samples from a version; a step stands there for each."""
        begin = self._begins[version]
        end = min([*self._begins[version + 1 : version + 2], before])
        own = [step for step in range(begin, end) if self.bucket[step] == bucket]
        if not own:
            return []
        epochs = self.epochs[version][bucket]
        begins = [self.places[step] - epochs.begin for step in own]
        until = begins[-1] + self.size(own[-1])
        places = [place for index in indices for place in epochs.stream.places(index, until)]
        return sorted(own[bisect_right(begins, place) - 1] for place in places)
