"""When losses jump: a run goes back to a checkpoint from before, and passes over the samples that it was trained on.

A loss is high when it lies far above the median of the last ones of its bucket, or is not finite; several in a row are
a spike. All ranks see the same losses, every checkpoint holds what they are compared with, and the steps after a spike
are a function of what the recipe, the data and the spikes before it say: a run that is killed meanwhile decides alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...data.batches import BatchHistory
from ...errors import CinemeshError
from ...parallel.runtime.mesh import Mesh
from ..storage.places import Location
from .checkpoint.choosing import published
from .checkpoint.manifest import step_of
from .checkpoint.publishing import remove, write_failed
from .checkpoint.together import together
from .in_memory.recovery import CopiesInMemory
from .recipe import SpikesSection

SPIKES = "spikes"  # of a checkpoint's note: those that the run was rolled back for
LOSSES = "usual_losses"  # of a note: what losses are compared with, of every bucket
NORMAL = 1.4826  # standard deviations of a normal distribution in its median absolute deviation
LEAST_SHARE = 0.01  # of the median: losses that hardly differ make no small rise a spike


@dataclass(frozen=True)
class Spike:
    """Losses of steps ``first`` to ``step``, from 1 on. ``usual``, with ``deviation``: of the last one's bucket."""

    first: int
    step: int
    loss: float
    usual: float
    deviation: float

    def __str__(self) -> str:
        which = (
            f"the loss of step {self.step} is"
            if self.first == self.step
            else f"losses are high since step {self.first}:"
        )
        return f"{which} {self.loss:.4g}, usual {self.usual:.4g} ± {self.deviation:.2g}"


@dataclass(frozen=True)
class RolledBack:
    """What a run takes along when it goes back: its batches up to the spike, and all spikes."""

    spikes: list[dict[str, Any]]
    batches: BatchHistory
    bucket_of: Sequence[int]  # of the steps so far

    def going_on(self, to: int, versions: Sequence[int]) -> BatchHistory:
        """Steps from ``to`` on pass over the samples. ``versions``: steps that another one begins with."""
        return self.batches.rolled_back(to, self.bucket_of, versions)

    def line(self, to: int) -> str:
        """For the log, once the run is back at step ``to``."""
        return f"back at step {to}; the samples of steps {to + 1} to {len(self.bucket_of)} are passed over"


class LossWatch:
    """The losses of a run, as they come. Without a section nothing is a spike."""

    def __init__(self, section: SpikesSection | None, buckets: int, note: Mapping[str, Any]) -> None:
        self.section = section
        known = note.get(LOSSES, {"usual": [[] for _ in range(buckets)], "high": 0})
        self.usual: list[list[float]] = [list(losses) for losses in known["usual"]]
        self.high: int = known["high"]  # in a row

    def add(self, step: int, bucket: int, loss: float) -> Spike | None:
        """The loss of ``step``, counted from 1; the spike that it completes, if it does."""
        if self.section is None:
            return None
        before = self.usual[bucket]
        if len(before) < self.section.window and math.isfinite(loss):
            before.append(loss)
            self.high = 0
            return None
        usual = statistics.median(before) if before else math.nan
        spread = statistics.median(abs(one - usual) for one in before) * NORMAL if before else math.nan
        deviation = max(spread, LEAST_SHARE * abs(usual))
        if loss <= usual + self.section.deviations * deviation:
            self.usual[bucket] = [*before[1:], loss]
            self.high = 0
            return None
        self.high += 1
        if self.high < self.section.steps:
            return None
        return Spike(step - self.high + 1, step, loss, usual, deviation)

    def noted(self) -> dict[str, Any]:
        """For a checkpoint's note."""
        return {LOSSES: {"usual": self.usual, "high": self.high}} if self.section else {}


def roll_back(
    spike: Spike,
    section: SpikesSection,
    directory: Location,
    copies: CopiesInMemory | None,
    before: Sequence[dict[str, Any]],
    mesh: Mesh | None,
) -> list[dict[str, Any]]:
    """Leave the checkpoints that a run goes back to the newest of; all spikes, with this one. Collective.

    Later ones are removed, after all ``copies`` in memory: they are of steps that are not the run's any more. Raises
    CinemeshError, on all ranks, for one spike too many, and where they cannot be removed.
    """
    if len(before) >= section.limit:
        raise CinemeshError(
            f"step {spike.step}: {spike}. The run was rolled back {section.limit} times already (spikes.limit)",
            remedy="lower optimizer.lr, look at what these steps drew (cinemesh replay), or raise the limit",
        )

    if copies is not None:
        copies.forget()

    def remove_later() -> None:
        if mesh is not None and mesh.rank:
            return
        known = published(directory)
        good = [path for path in known if (step_of(path) or 0) < spike.first]
        kept = good[min(section.checkpoints, len(good)) - 1 :] if good else []
        for path in known:
            if path not in kept:
                try:
                    remove(path)
                except OSError as error:
                    raise write_failed(path, error) from error

    together(mesh, remove_later)
    return [*before, {"first": spike.first, "step": spike.step, "what": str(spike)}]
