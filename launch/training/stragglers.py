"""Ranks that compute longer than the others: every step, by what each says in the vote before the next one.

A step takes as long on all ranks, since they wait for one another; what tells them apart is the time in which a rank
does not wait. The seconds of all travel in a vector that is summed over the hosts anyway. A launch on a GPU returns
before its work is done: there no rank knows, and none says anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from torch.distributed.distributed_c10d import Store

from ..cluster.processes import Joined
from ..cluster.roll_call import machines_of
from .card_watch import CardWatch

SLOWER = 1.25  # times the median rank's: beyond what equal devices differ by (H200: 2 %), and turns of a busy CPU
FEWEST_STEPS = 5  # of an interval: in fewer, one late page or interrupt would name a rank
MOST_TOLD = 4
UNITS_PER_S = 1_000_000  # of what is summed: whole microseconds


@dataclass(frozen=True)
class Straggler:
    """A rank that took ``times`` as long as the median one, ``seconds`` of a step."""

    rank: int
    times: float
    seconds: float


@dataclass
class Stragglers:
    """Of one start of a run. ``store``: of its round, ``cards``: its GPUs, where there are any."""

    store: Store | None = None
    cards: CardWatch | None = None
    steps: list[list[float]] = field(default_factory=list)  # of this interval: seconds of every rank
    named: frozenset[int] = frozenset()

    @classmethod
    def of(cls, place: Joined) -> Stragglers:
        return cls(place.meeting.store if place.meeting else None, CardWatch.of(place))

    def add(self, units: Sequence[int]) -> None:
        """What all ranks said of one step; nothing of one that a rank says nothing of."""
        if len(units) > 1 and all(units):
            self.steps.append([each / UNITS_PER_S for each in units])

    def interval(self) -> list[Straggler]:
        """Those of the interval that ends, the slowest first: by the median over its steps of time over median time."""
        steps, self.steps = self.steps, []
        if len(steps) < FEWEST_STEPS:
            return []
        usual = [median(each) for each in steps]
        found: list[Straggler] = []
        for rank in range(len(steps[0])):
            times = median(each[rank] / of for each, of in zip(steps, usual, strict=True))
            if times >= SLOWER:
                found.append(Straggler(rank, times, median(each[rank] for each in steps)))
        return sorted(found, key=lambda one: -one.times)

    def news(self, found: Sequence[Straggler], predicted_s: float | None) -> str | None:
        """Who is slow, when that changes. ``predicted_s``: what the plan's price has for a rank's step."""
        now = frozenset(one.rank for one in found)
        if now == self.named:
            return None
        self.named = now
        if not found:
            return "no rank computes longer than the others any more"
        priced = f", predicted {predicted_s:.3g} s" if predicted_s is not None else ""
        told = [
            f"rank {one.rank} computes {one.times:.2f} times as long as the median rank, {one.seconds:.3g} s a step"
            f"{priced}{self._about(one.rank)}"
            for one in found[:MOST_TOLD]
        ]
        more = f"; and {len(found) - MOST_TOLD} more" if len(found) > MOST_TOLD else ""
        return f"WARNING: {'; '.join(told)}{more}"

    def _about(self, rank: int) -> str:
        """Where a rank is, and what its GPU says of itself."""
        where = "" if self.store is None else machines_of(self.store, [rank]).get(rank, "")
        card = self.cards.told_of(rank) if self.cards is not None else ""
        return "".join(f", {said}" for said in (where, card) if said)
