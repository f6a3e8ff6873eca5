"""The search space: families of plans and their variants, which the search opens (torch-free).

A family is a choice of tp, cp, samples and micro-batches. Its variants differ in the size of the FSDP shard group, the
placement of the axes on the network, and how much is recomputed: the lightest mode that fits, and in as many of the
last blocks as the memory left over allows, the next lighter one.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ...errors import CinemeshError
from ...model.step import check
from ...parallel.ir.fields import AXES
from ...parallel.ir.layout import HEADS, TOKENS_GATHERED
from ...parallel.ir.plan import Plan
from ..prices.network import Groups, groups_of
from ..prices.timeline import beyond_domain, check_fused
from .evaluator import BuiltPlan, Evaluator
from .extrapolate import Extrapolation
from .few_blocks import FewBlocks, overlaps
from .lower_bound import LowerBound, Recompute
from .refusals import FamilyKey
from .request import Request

SHARDED = ("dp_shard", "dp_replicate")
Mode = tuple[Recompute, Recompute | None]  # how blocks recompute, and what as many of the last ones as fit do instead
KEEPS_ATTENTION: Recompute = ("o", "lse")  # it is what costs most to run again, and its output is small
MODES: tuple[Mode, ...] = (  # most kept bytes first
    ("none", None),
    ("selective", "none"),
    (KEEPS_ATTENTION, "selective"),
    ("full", KEEPS_ATTENTION),
)


def divisors(value: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(value) + 1) if value % d == 0]
    return sorted({*small, *(value // d for d in small)})


def everywhere(request: Request) -> Plan:
    """The fixed fields on degrees that allow every overlap; ``with_degrees`` drops those that others cannot have."""
    searched = (*AXES, "order", "micro_batches", *(() if "offload" in request.fixed else ("recompute",)))
    fixed = {name: value for name, value in request.fixed.items() if name not in searched}
    values: dict[str, Any] = {"dtype": request.dtype, "prefetch": 1, "grad_units": 2} | fixed
    return Plan(tp=2, cp=2, dp_shard=2, **values)


class SearchSpace:
    """What all families of one request share: the evaluator and the lower bounds.

    Raises CinemeshError when the fixed fields share the GPU as it cannot be shared.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.evaluator = Evaluator(request)
        self.plain = everywhere(request)
        self.evaluator.models.compute.check(self.plain)
        self.too_big: dict[object, int] = {}  # the largest cp that did not fit, by all else that families differ in
        self._bounds: dict[object, list[LowerBound]] = {}

    def bounds(self, plan: Plan, samples: int) -> list[LowerBound]:
        """One for each bucket."""
        key = (*overlaps(plan).values(), samples)
        if key not in self._bounds:
            one = replace(self.plain, tp=plan.tp, cp=plan.cp, **overlaps(plan))
            few = self.evaluator.few(one, samples)
            self._bounds[key] = [LowerBound(of, self.evaluator.models) for of in few]
        return self._bounds[key]


@dataclass(frozen=True)
class Variant:
    """A plan that can be played, and a lower bound of its step."""

    bound_s: float
    built: BuiltPlan


class Family:
    """Variants of one choice of tp, cp, samples and micro-batches."""

    def __init__(self, space: SearchSpace, key: FamilyKey) -> None:
        self.space, self.evaluator, self.request = space, space.evaluator, space.request
        self.key, self.samples = key, key.samples
        self.data_ranks = self.request.gpus // key.model_parallel
        degrees = {"tp": key.tp, "cp": key.cp, "dp_shard": self.data_ranks}
        self.plan = space.plain.with_degrees(**degrees, micro_batches=key.micro_batches)
        self.host_refused = ""  # why what is offloaded does not fit there
        self.needed_bytes = (
            0  # of its own buffers and encoders, by the last mode that did not fit the largest shard group
        )
        self._placements: dict[tuple[int, int], list[tuple[tuple[str, ...], Groups]]] = {}
        self._few: dict[tuple[bool, bool], list[FewBlocks]] = {}
        self._steps: dict[object, list[Extrapolation]] = {}

    @property
    def global_batch(self) -> int:
        return self.key.global_batch(self.request.gpus)

    def check_placement(self) -> None:
        """Raise CinemeshError where a group of tp would lie in more NVLink domains than fused records reach."""
        order: Any = self.request.fixed.get("order", self.plan.order)
        check_fused(replace(self.plan, order=order), self.request.cluster)

    def check_shapes(self) -> None:
        """Raise CinemeshError where a degree does not divide what it splits of the model or of a bucket."""
        for batch in self.request.batches(self.samples):
            check(self.request.config, self.plan, batch)

    def steps(self, plan: Plan) -> list[Extrapolation]:
        """Programs that price a plan of this family, one for each bucket."""
        few = self._few_of(plan)
        last_blocks = plan.last_blocks if few[0].more == 0 else 0  # of a deeper model, so many stand for any number
        key = (plan.recompute, plan.recompute_last, last_blocks, plan.dp_shard * plan.cp == 1)
        if key not in self._steps:
            self._steps[key] = [Extrapolation(one, plan, self.evaluator.models) for one in few]
        return self._steps[key]

    def _few_of(self, plan: Plan) -> list[FewBlocks]:
        key = (plan.dp_shard * plan.cp == 1, plan.recompute_last is not None)
        if key not in self._few:
            self._few[key] = self.evaluator.few(plan, self.samples)
        return self._few[key]

    def built(self, plan: Plan) -> BuiltPlan:
        """A plan of this family with the programs that price it."""
        return BuiltPlan(plan, self.samples, tuple(self.steps(plan)))

    # -- before anything is built ---------------------------------------------------------------------------------

    def modes(self) -> tuple[Mode, ...]:
        """From the least added work to the least kept bytes; those that cannot fit, whatever is sharded, left out."""
        fixed = self.request.fixed
        if "recompute" in fixed:
            return ((fixed["recompute"], None),)  # type: ignore[return-value]
        limit = self.evaluator.limit_bytes(self.plan)
        return tuple(mode for mode in MODES[:-1] if self.least_bytes(mode[0]) <= limit) + MODES[-1:]

    def least_bytes(self, recompute: Recompute, plan: Plan | None = None) -> float:
        """A lower bound of what the program's own buffers need under a plan's shard group; without one, the largest."""
        bounds = self.space.bounds(self.plan, self.samples)
        return max(bound.peak_bytes(recompute, plan or self.plan) for bound in bounds)

    def bound_s(self, mode: Mode, *, placed: bool = False) -> float:
        """A lower bound of the step of every variant of a mode; ``placed``: on the network as their axes can lie."""
        recompute, lighter = mode
        shares = [(1.0, recompute)]
        if lighter is not None:
            spare = self.evaluator.limit_bytes(self.plan) - self.least_bytes(recompute)
            bounds = self.space.bounds(self.plan, self.samples)
            each = min(bound.kept_bytes(lighter) - bound.kept_bytes(recompute) for bound in bounds)
            blocks = spare * self.plan.tp * self.plan.cp / each if each else math.inf  # a lighter mode keeps no more
            share = min(1.0, max(0.0, blocks / self.request.config.layers))
            shares = [(1.0 - share, recompute), (share, lighter)]
        places = [*self._distinct_places()] if placed else []
        least = min(sum(part * self._bound_s(of, at) for part, of in shares if part > 0.0) for at in places or [None])
        return least * self.request.cluster.spread.factor(self.request.gpus)

    def _bound_s(self, recompute: Recompute, groups: Groups | None) -> float:
        bounds = self.space.bounds(self.plan, self.samples)
        return self.evaluator.mean(bound.step_s(recompute, self.plan, groups) for bound in bounds)

    def _distinct_places(self) -> Collection[Groups]:
        """Where the groups over tp and over cp may lie, whatever the shard group."""
        found: dict[object, Groups] = {}
        for n in self.shard_groups():
            plan = self.plan.with_degrees(dp_shard=n, dp_replicate=self.data_ranks // n)
            for _, groups in self.placements(plan):
                found[groups.get(HEADS), groups.get(TOKENS_GATHERED)] = groups
        return found.values()

    # -- variants -------------------------------------------------------------------------------------------------

    def shard_groups(self) -> list[int]:
        """Sizes of the shard group that may be: none where one that is fixed does not divide the data ranks."""
        fixed, ranks = self.request.fixed, self.data_ranks

        def held(n: int) -> bool:
            return fixed.get("dp_shard", n) == n and fixed.get("dp_replicate", ranks // n) == ranks // n

        return [n for n in divisors(ranks) if held(n)]

    def no_groups(self) -> str:
        """Why there are none, with the numbers."""
        given = " * ".join(f"{a}({self.request.fixed[a]})" for a in SHARDED if a in self.request.fixed)
        both = all(axis in self.request.fixed for axis in SHARDED)
        rule = f"{given} != data ranks" if both else f"data ranks % {given} != 0"
        return f"{rule}: gpus({self.request.gpus}) / tp({self.plan.tp}) / cp({self.plan.cp}) = {self.data_ranks}"

    def placements(self, plan: Plan) -> list[tuple[tuple[str, ...], Groups]]:
        """Rank orders that lie differently on the network, with where they put every group.

        Replicas speak once a step: their axis stays outermost.
        """
        key = (plan.dp_shard, plan.dp_replicate)
        if key not in self._placements:
            cluster = self.request.cluster
            split = [axis for axis in AXES[:-1] if plan.size(axis) > 1]
            rest = tuple(axis for axis in AXES if axis not in split)
            fixed = self.request.fixed.get("order")
            orders = [fixed] if fixed else [(*permuted, *rest) for permuted in itertools.permutations(split)]
            distinct: dict[object, tuple[tuple[str, ...], Groups]] = {}
            for order in orders:
                groups = groups_of(plan, cluster, order)  # type: ignore[arg-type]
                if HEADS in groups and beyond_domain(plan, cluster, groups[HEADS]):
                    continue
                distinct.setdefault(tuple(groups.values()), (order, groups))  # type: ignore[arg-type]
            self._placements[key] = list(distinct.values())
        return self._placements[key]

    def too_big(self, recompute: Recompute) -> bool:
        """Whether a family with the same tp that splits further did not fit either: then this one is not built."""
        return self.plan.cp <= self.space.too_big.get(self._alike(recompute), 0)

    def _alike(self, recompute: Recompute) -> object:
        """What families that differ in cp alone have in common."""
        return (self.plan.tp, self.samples, self.plan.micro_batches, recompute)

    def expand(self, mode: Mode, groups: list[int]) -> tuple[list[Variant], list[int]]:
        """Variants of one mode over shard groups of these sizes, and the sizes that do not fit.

        A larger shard group never needs more memory, so the smallest one that fits is found by bisection.
        """
        recompute, lighter = mode
        base = replace(self.plan, recompute=recompute)
        plans = [base.with_degrees(dp_shard=n, dp_replicate=self.data_ranks // n) for n in groups]

        if plans and base.offload:
            host_bytes = max(step.host_bytes(plans[-1]) for step in self.steps(plans[-1]))
            try:
                self.request.cluster.check_host(host_bytes)
            except CinemeshError as error:
                self.host_refused = error.problem
                return [], groups

        def fits(plan: Plan) -> bool:
            free = self.evaluator.limit_bytes(plan) - self.held_bytes(plan)
            return self.least_bytes(recompute, plan) <= free and self._peak_bytes(plan) <= free

        first = len(plans)
        if lighter is not None:  # where one block can be lighter, nobody asks for none
            first = bisect_left(
                [replace(plan, recompute_last=lighter, last_blocks=1) for plan in plans], True, key=fits
            )
        first = bisect_left(plans[:first], True, key=fits)
        if first == len(plans):
            self.needed_bytes = self._peak_bytes(plans[-1]) + self.held_bytes(plans[-1])
            alike = self._alike(recompute)
            self.space.too_big[alike] = max(self.plan.cp, self.space.too_big.get(alike, 0))
        variants: list[Variant] = []
        for plan in plans[first:]:
            limit = self.evaluator.limit_bytes(plan)
            if lighter is not None:
                plan = self._lightened(plan, lighter, limit - self.held_bytes(plan))
            variants += self._placed(plan, limit)
        return variants, groups[:first]

    def held_bytes(self, plan: Plan) -> int:
        """The least that the encoders need beside a plan."""
        return min(way.bytes if way else 0 for way in self.evaluator.encoders(plan, self.samples))

    def _peak_bytes(self, plan: Plan) -> int:
        return max(step.peak_bytes(plan) for step in self.steps(plan))

    def _lightened(self, plan: Plan, lighter: Recompute, limit: float) -> Plan:
        """The plan with as many last blocks on the lighter mode as fit."""
        layers = self.request.config.layers

        def too_many(last: int) -> bool:
            return self._peak_bytes(replace(plan, recompute_last=lighter, last_blocks=last)) > limit

        blocks = bisect_left(range(1, layers), True, key=too_many)
        return replace(plan, recompute_last=lighter, last_blocks=blocks) if blocks else plan

    def _placed(self, plan: Plan, limit: float) -> Iterator[Variant]:
        """One plan in every placement that differs on the network, with the fastest way to hold the encoders."""
        built = self.built(plan)
        peak = built.program_bytes
        for order, groups in self.placements(plan):
            placed = replace(plan, order=order)
            ways = self.evaluator.encoders(placed, self.samples)
            held = next(way for way in ways if peak + (way.bytes if way else 0) <= limit)
            bound_s = self.evaluator.placed_bound_s(built, groups, held)
            yield Variant(bound_s, BuiltPlan(placed, self.samples, built.steps, held))
