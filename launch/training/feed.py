"""The batches of a run, in the order that its seed says: read by threads, some steps ahead.

A step's samples are a function of the seed, the step, the versions that the run draws from and how many samples the
steps before took: what was read ahead is what would be read then, and what another number of data ranks reads.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from ...data.batches import BatchHistory
from ...data.cache.drawn import Drawn, Epochs, RunOrder
from ...data.cache.held import HELD_BYTES
from ...data.cache.history import History
from ...data.cache.samples import CaptionDraw, Samples, collate
from .recipe import Config

if TYPE_CHECKING:
    from torch import Tensor

    from ...model.buckets import BucketRunner
    from ...model.runner import StepRunner

AHEAD = 3  # steps that are read before they are wanted: one that comes late is waited for by none of the others
READERS = 4  # threads; a step is read by one of them


def run_order(config: Config, batches: BatchHistory) -> RunOrder:
    """What decides which samples the steps of a recipe's run take."""
    return RunOrder(config.seed, config.schedule.steps, config.data.step_weights, batches)


class Feed:
    """Of one data rank."""

    def __init__(self, config: Config, history: History, data_rank: int, batches: BatchHistory) -> None:
        self.config, self.data_rank, self.batches = config, data_rank, batches
        self.drawn = Drawn(run_order(config, batches), history)
        self.bucket = self.drawn.bucket
        self._train = {id(epochs): self._read_as(epochs) for of in self.drawn.epochs for epochs in of}
        self._pool = ThreadPoolExecutor(READERS, "feed")
        self._ahead: dict[int, Future[list[dict[str, Tensor]]]] = {}

    def _read_as(self, epochs: Epochs) -> Samples:
        """By whole blocks, where those of this rank's lanes find room in memory; else one by one."""
        stream = epochs.stream
        lanes = -(-stream.lanes // self.config.plan.data_ranks)
        blocks = min(lanes + 1, -(-stream.size // stream.block))
        whole = blocks * stream.block * epochs.train.latent_bytes <= HELD_BYTES
        return epochs.train.in_blocks(stream.block if whole else 1)

    def ids(self, step: int) -> list[int]:
        """Of the samples of a step's whole global batch. Raises CinemeshError for an index that cannot be read."""
        return self.drawn.at(step).train.ids(self.drawn.indices(step))

    def take(self, step: int) -> list[dict[str, Tensor]]:
        """This data rank's samples of each micro-batch. Raises CinemeshError for a sample that cannot be read."""
        for passed in [at for at in self._ahead if not step <= at <= step + AHEAD]:
            self._ahead.pop(passed).cancel()
        for at in range(step, min(step + AHEAD + 1, self.config.schedule.steps)):
            if at not in self._ahead:
                self._ahead[at] = self._pool.submit(self._read, at)
        return self._ahead.pop(step).result()

    def load(self, step: int, runner: BucketRunner | StepRunner) -> None:
        """Load a step's samples. Raises CinemeshError as ``take``."""
        for micro_batch, batch in enumerate(self.take(step)):
            runner.load(micro_batch, batch)

    def taken(self, step: int) -> list[int]:
        """Of each bucket's stream, how many samples the steps before this one took."""
        return self.batches.taken(self.bucket[:step])

    def close(self) -> None:
        """Read nothing more."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> list[dict[str, Tensor]]:
        plan, indices = self.config.plan, self.drawn.indices(step)
        train, share = self._train[id(self.drawn.at(step))], len(indices) // plan.micro_batches
        return [
            collate(
                train.select(indices[first : first + share], CaptionDraw(self.config.seed, step, first)),
                self.data_rank, plan.data_ranks, first,
            )
            for first in range(0, len(indices), share)
        ]  # fmt: skip
