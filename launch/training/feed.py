"""The batches of a run, in the order that its seed says: read when a step begins, on a GPU while the one before runs.

A step's samples are a function of the seed, the step and how many the steps before took (``batches.py``), so what was
read ahead is what would be read then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...data.cache import Cache, collate
from ...data.order import Stream, balanced, drawn_buckets, samples_of_a_read
from ...errors import CinemeshError
from .batches import BatchHistory
from .recipe import Config

if TYPE_CHECKING:
    from torch import Tensor

    from ...model.buckets import BucketRunner
    from ...model.runner import StepRunner


@dataclass(frozen=True)
class StepBatches:
    """``ids``: of the whole global batch; ``micro_batches``: this data rank's samples of each."""

    step: int
    ids: list[int]
    micro_batches: list[dict[str, Tensor]]


class Feed:
    """Of one data rank."""

    def __init__(self, config: Config, cache: Cache, data_rank: int, history: BatchHistory) -> None:
        self.config, self.cache, self.data_rank, self.history = config, cache, data_rank, history
        data, seed = config.data, config.seed
        self.weights = [bucket.weight for bucket in data.shapes]
        self.bucket: list[int] = drawn_buckets(seed, config.schedule.steps, self.weights).tolist()  # of every step
        self.places = history.places(self.bucket)
        trained = [windows.train for windows in cache.buckets]
        self.streams = [
            Stream(seed, bucket, balanced(train.scenes, data.balance), samples_of_a_read(train.latent_bytes))
            for bucket, train in enumerate(trained)
        ]
        self._ahead: StepBatches | None = None

    def take(self, step: int) -> StepBatches:
        """Raises CinemeshError for a sample that cannot be read."""
        ahead, self._ahead = self._ahead, None
        return ahead if ahead is not None and ahead.step == step else self._read(step)

    def load(self, step: int, runner: BucketRunner | StepRunner) -> list[int]:
        """Load a step's samples; the ids of its whole global batch. Raises CinemeshError as ``take``."""
        taken = self.take(step)
        for micro_batch, batch in enumerate(taken.micro_batches):
            runner.load(micro_batch, batch)
        return taken.ids

    def taken(self, step: int) -> list[int]:
        """Of each bucket's stream, how many samples the steps before this one took."""
        return self.history.taken(self.bucket[:step])

    def read_ahead(self, step: int) -> None:
        """What ``take`` will be asked for next. What cannot be read is told there: it is another step's failure."""
        try:
            self._ahead = self._read(step) if step < self.config.schedule.steps else None
        except CinemeshError:
            self._ahead = None

    def _read(self, step: int) -> StepBatches:
        plan, bucket = self.config.plan, self.bucket[step]
        size = self.history.at(step)[bucket]
        train, share = self.cache.buckets[bucket].train, size // plan.micro_batches
        indices = self.streams[bucket].take(self.places[step], size)
        batches = [
            collate(train.select(indices[first : first + share]), self.data_rank, plan.data_ranks, first)
            for first in range(0, size, share)
        ]
        return StepBatches(step, [train.first_id + index for index in indices], batches)
