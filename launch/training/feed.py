"""The batches of a run, in the order that its seed says: read by threads, some steps ahead.

A step's samples are a function of the seed, the step, the versions that the run draws from and how many samples the
steps before took: what was read ahead is what would be read then, and what another number of data ranks reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from ...data.batches import BatchHistory
from ...data.cache.ahead import ReadAhead
from ...data.cache.drawn import Drawn, Epochs, RunOrder
from ...data.cache.held import HELD_BYTES
from ...data.cache.history import History
from ...data.cache.samples import CaptionDraw, Samples, collate
from ...data.encoding import Encoding
from .captions import TextAhead, loop_encoding
from .recipe import Config

if TYPE_CHECKING:
    from torch import Tensor

    from ...model.buckets import BucketRunner
    from ...model.runner import StepRunner

AHEAD = 3  # steps that are read before they are wanted: one that comes late is waited for by none of the others
READERS = 2  # threads; a step is read by one of them. More take turns at the interpreter, where samples are small


def run_order(config: Config, batches: BatchHistory) -> RunOrder:
    """What decides which samples the steps of a recipe's run take."""
    return RunOrder(config.seed, config.schedule.steps, config.data.step_weights, batches)


class Feed:
    """Of one data rank."""

    def __init__(
        self, config: Config, history: History, data_rank: int, batches: BatchHistory, encoding: Encoding
    ) -> None:
        self.config, self.data_rank, self.batches = config, data_rank, batches
        self.text = TextAhead(config, loop_encoding(config, encoding), self.captions)
        self.drawn = Drawn(run_order(config, batches), history)
        self.bucket = self.drawn.bucket
        self._train: dict[int, Samples] = {}
        self._pool = ThreadPoolExecutor(READERS, "feed")
        self._blocks = ReadAhead(self._mine, self._hold(), config.schedule.steps)
        self._ahead: dict[int, Future[list[dict[str, Tensor]]]] = {}

    def _hold(self) -> int:
        """Have samples read by whole blocks, where those of this rank's lanes find room in memory; else one by one.

        The steps for which blocks are read ahead, where the next of each lane find room too.
        """
        steps = 0
        for buckets in self.drawn.epochs:
            room = sum(self._held_bytes(epochs) for epochs in buckets)
            for epochs in buckets:
                block = epochs.stream.block if room <= HELD_BYTES else 1
                self._train[id(epochs)] = epochs.train.in_blocks(block)
                steps = max(steps, block if 2 * room <= HELD_BYTES else 0)
        return steps

    def _held_bytes(self, epochs: Epochs) -> int:
        """Of the blocks that this rank's lanes of a bucket stay with."""
        stream = epochs.stream
        lanes = -(-stream.lanes // self.config.plan.data_ranks)
        blocks = min(lanes + 1, -(-stream.size // stream.block))
        return blocks * stream.block * epochs.train.latent_bytes

    def ids(self, step: int) -> list[int]:
        """Of the samples of a step's whole global batch. Raises CinemeshError for an index that cannot be read."""
        return self.drawn.at(step).train.ids(self.drawn.indices(step))

    def take(self, step: int) -> list[dict[str, Tensor]]:
        """This data rank's samples of each micro-batch. Raises CinemeshError for a sample that cannot be read."""
        self._blocks.take(step)
        for passed in [at for at in self._ahead if not step <= at <= step + AHEAD]:
            self._ahead.pop(passed).cancel()
        for at in range(step, min(step + AHEAD + 1, self.config.schedule.steps)):
            if at not in self._ahead:
                self._ahead[at] = self._pool.submit(self._read, at)
        return self._ahead.pop(step).result()

    def load(self, step: int, runner: BucketRunner | StepRunner) -> None:
        """Load a step's samples, whose captions were encoded. Raises CinemeshError as ``take``."""
        for micro_batch, (batch, text) in enumerate(zip(self.take(step), self.text.take(step), strict=True)):
            runner.load(micro_batch, batch | text)

    def encode(self, step: int) -> None:
        """Captions of a step, and of others of its turn, where they are encoded in the loop. Collective."""
        self.text.read(step)
        self.text.encode()

    def captions(self, step: int) -> list[list[str]]:
        """Of this data rank's samples of each micro-batch. Raises CinemeshError for an index that cannot be read."""
        return [[samples.text(number) for number in range(len(samples))] for samples in self._mine(step)]

    def taken(self, step: int) -> list[int]:
        """Of each bucket's stream, how many samples the steps before this one took."""
        return self.batches.taken(self.bucket[:step])

    def close(self) -> None:
        """Read nothing more."""
        self._blocks.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> list[dict[str, Tensor]]:
        ranks = self.config.plan.data_ranks
        return [collate(samples, self.data_rank, ranks, first) for first, samples in self._micro_batches(step)]

    def _mine(self, step: int) -> Iterator[Samples]:
        """This data rank's of each micro-batch; nothing is read."""
        for _, samples in self._micro_batches(step):
            share = len(samples) // self.config.plan.data_ranks
            yield samples[self.data_rank * share : (self.data_rank + 1) * share]

    def _micro_batches(self, step: int) -> Iterator[tuple[int, Samples]]:
        """Of all data ranks: place of the first sample, and samples, of which nothing is read yet."""
        train, indices = self._train[id(self.drawn.at(step))], self.drawn.indices(step)
        share = len(indices) // self.config.plan.micro_batches
        for first in range(0, len(indices), share):
            yield first, train.select(indices[first : first + share], CaptionDraw(self.config.seed, step, first))
