"""A plan's overlap knobs by what they bring, what it keeps, how its GPU is shared (torch-free).

The search ranks plans of a few recompute modes whose unit gradients are reduced behind compute and that slice nothing.
Here the parts of K and V, token slices, deferral, prefetch depth and smaller shard groups are tried, each on top of
what the ones before brought, and kept when the step becomes shorter by more than ``WORTH``, until none pays any more.
Programs that serve many plans say so; what comes of it is priced by its own, and where that says otherwise, all on the
way to it are. Then the activations worth keeping are chosen for the memory that is left, and for the host's. Last come
thread blocks, SM margin and priorities: they change prices and no record, so all are tried on one built program, and
played only where a lower bound leaves something to win.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from ...errors import CinemeshError
from ...parallel.ir.fields import Overlap, Streams
from ...parallel.ir.knobs import knobs
from ...parallel.ir.plan import Plan
from ...parallel.passes.choose_kept import block_of, choose_kept, offloads
from .evaluator import BuiltPlan, Evaluator
from .extrapolate import Extrapolation
from .few_blocks import FewBlocks
from .planner import Search
from .request import PricedPlan, Request, Timed

WORTH = 1e-3  # relative gain below which a knob stays as it was: slices cost kernels and launches that no model sees
SMALLER = (2, 4, 8, 16, 32, 48)  # parts of the shard group
# NCCL's own: up to 24 thread blocks, with priority, and no margin.
SHARING = {name: knob.tries for name, knob in knobs(Streams).items()}


Change = dict[str, Any]


def _changes() -> Iterator[list[Change]]:
    """What may be changed of the overlap, one knob after the other: its values, those of the knobs tried with it."""
    table = knobs(Overlap)
    beside = {name for knob in table.values() for name in knob.tried_with}
    for name, knob in table.items():
        if name not in beside:
            tried = {other: table[other].tries for other in (*knob.tried_with, name)}
            off = {other: table[other].off for other in knob.rivals}
            yield [off | dict(zip(tried, values, strict=True)) for values in itertools.product(*tried.values())]


def _enough(best: PricedPlan) -> float:
    """Seconds below which another plan pays."""
    return best.step_s * (1.0 - WORTH)


@dataclass(frozen=True)
class _Tried:
    """A plan with its price, and the few blocks that priced it."""

    choice: PricedPlan
    built: BuiltPlan


def tune(request: Request, choice: PricedPlan, evaluator: Evaluator | None = None) -> PricedPlan:
    """The same degrees of tp and cp and the same placement, with what pays.

    Raises CinemeshError where the GPU cannot be shared as it was fixed by hand.
    """
    evaluator = evaluator or Evaluator(request)
    by_hand = {name: value for name, value in request.fixed.items() if name in SHARING}
    evaluator.models.compute.check(replace(choice.plan, **cast(dict[str, Any], by_hand)))
    before = evaluator.settled(choice) if choice.timed is Timed.SHARED else choice
    best = _Tuner(evaluator).tuned(choice)
    if best is None or best.choice.plan == before.plan:
        return before
    after = evaluator.settled(replace(best.choice, bound_s=evaluator.bound_s(best.built), timed=Timed.SHARED))
    fits = after.peak_bytes <= evaluator.request.cluster.memory.usable_bytes
    return after if fits and after.step_s < before.step_s else before


class _Tuner:
    """Tries changes of one plan after the other, each kept where it pays."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator, self.request = evaluator, evaluator.request
        self._refused: set[Plan] = set()  # what did not pay: nor will it beside a plan that is faster still

    def tuned(self, choice: PricedPlan) -> _Tried | None:
        """The best of the plan as it is, in its shard group, and in the one that suits it; None where it cannot be."""
        if (built := self._build(choice, choice.plan)) is None:
            return None
        first = self._priced(choice, built)
        same = self._overlapping([first], groups=(1,))
        finished = [first, self._finished(self._proven(same))]
        if self._smaller_fits(same[-1]):
            before, path = same, self._overlapping(same, groups=(1, *SMALLER))
            while len(path) > len(before):
                before, path = path, self._overlapping(path, groups=(1, *SMALLER))
            if len(path) > len(same):
                finished.append(self._finished(self._proven(path)))
        fitting = (tried for tried in finished if tried is first or self._fits(tried.choice))
        return min(fitting, key=lambda tried: tried.choice.step_s)

    # -- prices ---------------------------------------------------------------------------------------------------

    def _build(self, choice: PricedPlan, plan: Plan) -> BuiltPlan | None:
        try:
            return self.evaluator.build(plan, choice.samples, choice.frozen)
        except CinemeshError:
            return None

    def _priced(self, choice: PricedPlan, built: BuiltPlan, *, own: bool = False) -> _Tried:
        cost = self.evaluator.own_cost(built) if own else self.evaluator.cost(built)
        priced = replace(
            choice, plan=built.plan, step_s=cost.step_s, compute_s=cost.compute_s, peak_bytes=cost.peak_bytes
        )
        return _Tried(priced, built)

    def _seems(self, best: PricedPlan, built: BuiltPlan) -> float:
        """Seconds of a plan by the programs that serve many; infinite where a bound is no shorter than what pays."""
        return math.inf if self.evaluator.bound_s(built) >= _enough(best) else self.evaluator.step_s(built)

    def _pays(self, best: PricedPlan, built: BuiltPlan) -> _Tried | None:
        """A plan, if its step is shorter than the best one's by more than ``WORTH``."""
        if self._seems(best, built) >= _enough(best):
            return None
        tried = self._priced(best, built, own=built.rough)
        return tried if tried.choice.step_s < _enough(best) else None

    def _fits(self, choice: PricedPlan) -> bool:
        return choice.peak_bytes <= self.request.cluster.memory.usable_bytes

    def _fits_in(self, built: BuiltPlan) -> bool:
        return self.evaluator.peak_bytes(built) <= self.request.cluster.memory.usable_bytes

    # -- changes --------------------------------------------------------------------------------------------------

    def _changed(self, plan: Plan, change: Change) -> Plan | None:
        """None for what was fixed by hand, and for what these degrees or this GPU cannot have."""
        fixed = self.request.fixed
        if any(fixed.get(name, value) != value for name, value in change.items()):
            return None
        try:
            changed = replace(plan, **change)
            self.evaluator.models.compute.check(changed)
        except CinemeshError:
            return None
        return changed

    def _in_parts(self, plan: Plan, n: int) -> Plan | None:
        """The plan with its shard group in ``n`` parts; replicas of each other."""
        if plan.dp_shard % n:
            return None
        return self._changed(plan, {"dp_shard": plan.dp_shard // n, "dp_replicate": plan.dp_replicate * n})

    def _smaller_fits(self, same: _Tried) -> bool:
        """Whether there is memory for half the shard group: else none of that need be tried."""
        half = self._in_parts(same.choice.plan, SMALLER[0])
        return half is not None and self._fits_in(same.built.under(half))

    def _overlapping(self, path: list[_Tried], groups: tuple[int, ...]) -> list[_Tried]:
        """The path, and of each kind the best change that pays on top of it, in the shard group that suits it."""
        path = [*path]
        for changes in _changes():
            if (better := self._best_of(path[-1], changes, groups)) is not None:
                path.append(better)
        return path

    def _best_of(self, best: _Tried, changes: list[Change], groups: tuple[int, ...]) -> _Tried | None:
        """The change that pays most, in the shard group that suits it: one built program serves all of these."""
        pay: list[tuple[float, BuiltPlan]] = []
        for change in changes:
            plan = self._changed(best.choice.plan, change)
            if plan is None or plan == best.choice.plan:
                continue
            parts = (self._in_parts(plan, n) for n in groups)
            tried = [part for part in parts if part is not None and part not in self._refused]
            if not tried or (built := self._build(best.choice, plan)) is None:
                continue
            for part in tried:
                step_s = self._seems(best.choice, under := built.under(part))
                # What is kept may make room for a knob later on, not for a larger shard.
                if step_s < _enough(best.choice) and (part == plan or self._fits_in(under)):
                    pay.append((step_s, under))
                else:
                    self._refused.add(part)
        if not pay:
            return None
        least = min(step_s for step_s, _ in pay)
        _, first = next(one for one in pay if one[0] * (1.0 - WORTH) <= least)  # what slices least comes first
        return self._priced(best.choice, first)

    def _proven(self, path: list[_Tried]) -> _Tried:
        """The last of a path; where its own program says more than ``WORTH`` else, the best of all by theirs."""
        last = path[-1]
        if len(path) == 1 or not last.built.rough:
            return last
        own = self._priced(last.choice, last.built, own=True)
        if abs(own.choice.step_s - last.choice.step_s) <= WORTH * last.choice.step_s:
            return own
        every = (self._priced(tried.choice, tried.built, own=True) for tried in path)
        return min(every, key=lambda tried: tried.choice.step_s)

    def _finished(self, tried: _Tried) -> _Tried:
        """With what is worth keeping kept, and its GPU shared as it pays."""
        best = tried
        if "recompute" not in self.request.fixed:
            best = self._keeping(best.choice) or best
        return best if self.request.cluster.nccl is None else self._sharing(best)

    def _keeping(self, choice: PricedPlan) -> _Tried | None:
        """The activations kept that save most time in the memory that is left (``choose_kept.py``)."""
        layers, models = self.request.config.layers, self.evaluator.models
        pure = replace(choice.plan, recompute_last=None, last_blocks=0)
        mixed = replace(pure, recompute_last="none", last_blocks=1)
        few = {plan.last_blocks > 0: self._alone(choice, plan) for plan in (pure, mixed)}
        made: dict[Plan, tuple[Extrapolation, ...]] = {}

        def built(plan: Plan) -> BuiltPlan:
            programs = few[plan.recompute_last is not None]
            key = programs[0].under(plan)
            if key not in made:
                made[key] = tuple(Extrapolation(program, plan, models) for program in programs)
            return BuiltPlan(plan, choice.samples, made[key], choice.frozen)

        def peak_bytes(plan: Plan) -> int:
            return built(plan).program_bytes

        usable, host = self.request.cluster.memory.usable_bytes, self.request.cluster.host
        limit = int(self.evaluator.limit_bytes(choice.plan)) - (choice.frozen.bytes if choice.frozen else 0)
        seconds = models.record_s(pure)
        program = few[False][0].program
        block = block_of(program, seconds)
        while True:
            try:
                plan, kept = choose_kept(pure, program, seconds, limit, peak_bytes, blocks=layers)
            except CinemeshError:
                return None
            best = self._priced(choice, built(plan))
            if host is not None and "offload" not in self.request.fixed:
                more = offloads(pure, block, layers, limit, host.memory_bytes, peak_bytes, kept.seconds)
                best = self._offloading(best, map(built, more))
            if (over := self._peak_bytes(best.choice) - usable) <= 0:
                return best
            limit -= math.ceil(over)  # a few blocks tell a peak that is a little too low: the rest must fit in less

    def _alone(self, choice: PricedPlan, plan: Plan) -> list[FewBlocks]:
        """Of every bucket; what is tried once is not kept."""
        return [few.alone() for few in self.evaluator.few(plan, choice.samples)]

    def _offloading(self, best: _Tried, plans: Iterable[BuiltPlan]) -> _Tried:
        """With what pays of it in host memory: of plans that copy less and less, until that is slower again."""
        last = math.inf
        for built in plans:
            tried = self._priced(best.choice, built)
            if tried.choice.step_s > last:
                break
            last = tried.choice.step_s
            if last < _enough(best.choice):
                best = tried
        return best

    def _peak_bytes(self, choice: PricedPlan) -> int:
        """By whatever judges the plan later on."""
        return max(choice.peak_bytes, self.evaluator.settled(replace(choice, bound_s=0.0)).peak_bytes)

    def _sharing(self, best: _Tried) -> _Tried:
        """The thread blocks, priorities and margin that pay, tried until none pays any more."""
        before = None
        while best is not before:
            before = best
            for knob, values in SHARING.items():
                for value in values:
                    plan = self._changed(best.choice.plan, {knob: value})
                    if plan is not None:
                        best = self._pays(best.choice, best.built.under(plan)) or best
        return best


Watch = Callable[[list[PricedPlan]], Iterable[PricedPlan]]


def tuned(request: Request, found: Search, watch: Watch = iter) -> Search:
    """All plans of a table, tuned and ranked anew. ``watch`` sees them one by one: some seconds each."""
    choices = [tune(request, choice, found.evaluator) for choice in watch(found.choices)]
    choices.sort(key=lambda c: (c.per_sample_s, repr(c.plan)))
    return replace(found, choices=choices, untuned=found.best)
