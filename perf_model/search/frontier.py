"""What a search may still open, by its lower bound, and the plans priced so far (torch-free).

Families, then their recompute modes, then their variants are opened in the order of their lower bounds, until no bound
can reach the table.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

from .refusals import Refusal, RefusalKind
from .request import PricedPlan, Timed
from .space import Family, Mode, SearchSpace, Variant

SEEMS = 0.002  # of a step: what programs that serve many plans may be off by, before a plan's own is asked


@dataclass(order=True)
class _Todo:
    """Something that the search may open: a recompute mode of a family, or one variant to play.

    ``per_sample_s`` is a lower bound of what it can lead to; ``placed``: made with where a mode's axes can lie.
    """

    per_sample_s: float
    number: int
    family: Family = field(compare=False)
    modes: tuple[Mode, ...] = field(compare=False, default=())
    groups: list[int] = field(compare=False, default_factory=list)
    variant: Variant | None = field(compare=False, default=None)
    placed: bool = field(compare=False, default=False)


class Frontier:
    """What may still be opened, by its lower bound, and the plans priced so far."""

    def __init__(self, space: SearchSpace, families: list[Family], worth_s: float) -> None:
        self.space, self.request, self.worth_s = space, space.request, worth_s
        self._priced: dict[Family, list[PricedPlan]] = {}
        self._best: dict[Family, PricedPlan] = {}
        self._cut: dict[Family, list[_Todo]] = {}
        self._last_shown_s = math.inf  # a sample of the last plan shown, as far as known
        self._numbers = itertools.count()
        self._heap: list[_Todo] = []
        for family in reversed(families):  # of equal bounds, what splits most is opened first: it is the first to fit
            self._push(family, family.modes(), family.shard_groups())

    def settled(self) -> dict[Family, PricedPlan]:
        """The plans shown, the best first, each priced by its own program.

        The search goes on with what that says until no plan that it knows, and no bound, is below the last one shown.
        """
        self.exhaust()
        while True:
            shown = dict(self._ranked()[: self.request.shown])
            rough = [family for family, choice in shown.items() if choice.timed is Timed.SHARED]
            if not rough:
                return shown
            for family in reversed(rough):  # the best one last: more is asked of it, and the last program is kept
                priced, choice = self._priced[family], shown[family]
                priced[priced.index(choice)] = self.space.evaluator.settled(choice)
                self._rank(family)
            for todos in self._cut.values():
                for todo in [todo for todo in todos if not self._beyond(todo)]:
                    todos.remove(todo)
                    heapq.heappush(self._heap, todo)
            self.exhaust()

    def _ranked(self) -> list[tuple[Family, PricedPlan]]:
        return sorted(self._best.items(), key=lambda item: (item[1].per_sample_s, repr(item[1].plan)))

    def _rank(self, family: Family) -> None:
        """Of a family whose plans have changed, the best; what its own program priced stays ahead of a seeming tie."""
        times = [c.step_s * (1.0 + SEEMS * (c.timed is Timed.SHARED)) for c in self._priced[family]]
        least = min(times)
        ties = (choice for choice, time in zip(self._priced[family], times, strict=True) if time == least)
        self._best[family] = min(ties, key=lambda choice: repr(choice.plan))
        known = sorted(choice.per_sample_s for choice in self._best.values())
        self._last_shown_s = known[self.request.shown - 1] if len(known) >= self.request.shown else math.inf

    def _beyond(self, todo: _Todo) -> bool:
        """Whether what a todo leads to is no better than what is known."""
        if not self.request.prune:
            return False
        best = self._best.get(todo.family)
        least = best.per_sample_s if best else math.inf
        return todo.per_sample_s >= min(self._last_shown_s, self.worth_s, least)

    def _push(self, family: Family, modes: tuple[Mode, ...], groups: list[int], *, placed: bool = False) -> None:
        bound_s = family.bound_s(modes[0], placed=placed) / family.global_batch
        heapq.heappush(self._heap, _Todo(bound_s, next(self._numbers), family, modes, groups, placed=placed))

    def exhaust(self) -> None:
        """Open whatever has the lowest bound, until no bound is below the last plan shown."""
        while self._heap:
            todo = heapq.heappop(self._heap)
            if self._beyond(todo):
                self._cut.setdefault(todo.family, []).append(todo)
            elif todo.variant is not None:
                self._price(todo, todo.variant)
            elif not todo.placed:
                self._push(todo.family, todo.modes, todo.groups, placed=True)
            else:
                self._expand(todo)

    def _expand(self, todo: _Todo) -> None:
        """The variants of a mode that fit; what does not, under the next heavier mode."""
        family = todo.family
        if family.too_big(todo.modes[0][0]):
            variants, unfit = [], todo.groups
        else:
            variants, unfit = family.expand(todo.modes[0], todo.groups)
        for variant in variants:
            bound_s = variant.bound_s / family.global_batch
            heapq.heappush(self._heap, _Todo(bound_s, next(self._numbers), family, variant=variant))
        if unfit and todo.modes[1:]:
            self._push(family, todo.modes[1:], unfit)

    def _price(self, todo: _Todo, variant: Variant) -> None:
        family = todo.family
        built, cost = variant.built, self.space.evaluator.cost(variant.built)
        choice = PricedPlan(
            plan=built.plan,
            samples=family.samples,
            step_s=cost.step_s,
            compute_s=cost.compute_s,
            bound_s=variant.bound_s,
            peak_bytes=cost.peak_bytes,
            exposed_s=cost.exposed_s,
            global_batch=family.global_batch,
            mean_times=self.request.mean_times,
            bucket_s=cost.bucket_s,
            frozen=built.held,
        )
        self._priced.setdefault(family, []).append(choice)
        self._rank(family)

    @property
    def least_left_s(self) -> float:
        """A lower bound of a sample's seconds under all that was not opened."""
        return min((todo.per_sample_s for todos in self._cut.values() for todo in todos), default=math.inf)

    def refusal(self, family: Family) -> Refusal:
        """Why a family is not shown."""
        if family in self._priced:
            behind = self._best[family].per_sample_s / self._last_shown_s - 1.0
            return Refusal(RefusalKind.SLOWER, family.key, slower=behind)
        if family in self._cut:
            behind = min(todo.per_sample_s for todo in self._cut[family]) / min(self._last_shown_s, self.worth_s) - 1.0
            return Refusal(RefusalKind.SLOWER, family.key, slower=behind, at_least=True)
        if family.host_refused:
            return Refusal(RefusalKind.HOST, family.key, family.host_refused)
        fixed: Any = self.request.fixed.get("recompute", "")
        held = family.held_bytes(family.plan)
        full = family.least_bytes("full") + held
        need = family.needed_bytes or family.least_bytes(fixed or "full") + held
        free = self.space.evaluator.limit_bytes(family.plan)
        return Refusal(RefusalKind.MEMORY, family.key, needs_bytes=need, free_bytes=free, fixed=fixed, full_bytes=full)
