"""What a plan costs: the one place where modes, buckets, encoders and stragglers come together (torch-free).

A step is priced from a few blocks that serve many plans, from a few of its very own, or played whole. Search, tuning,
the choice of kept activations and explanations all ask here.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ...model.inputs import BatchShape
from ...model.step import check
from ...parallel.ir.plan import Plan
from ..clusters.cluster import Cluster
from ..prices.encoders import FrozenCost, frozen_options
from ..prices.footprint import outside
from ..prices.network import Groups, groups_of
from ..prices.played import PlayedStep, play_program
from .extrapolate import Extrapolation
from .few_blocks import PROVEN_BLOCKS, FewBlocks
from .request import PricedPlan, Request, Timed
from .unroll import NotSteady

BOUND_SLACK = 0.005  # relative: the bounds are of programs that serve many plans, whose records differ a little


@dataclass(frozen=True)
class PlanCost:
    """Of one step: mean seconds over the buckets by weight, encoders and stragglers included; bytes of one rank.

    ``exposed_s``: of those, the seconds in which compute waits for collectives. ``bucket_s``: a step of each bucket.
    """

    step_s: float
    compute_s: float
    exposed_s: float
    peak_bytes: int
    bucket_s: tuple[float, ...]


@dataclass(frozen=True)
class BuiltPlan:
    """A plan with the few blocks that price it, one program a bucket.

    The same programs serve a plan of another shard group, placement, margin, thread blocks or priorities (``under``).
    ``held``: the encoders beside it.
    """

    plan: Plan
    samples: int
    steps: tuple[Extrapolation, ...]
    held: FrozenCost | None = None

    def under(self, plan: Plan) -> BuiltPlan:
        """Another plan of the same records."""
        return replace(self, plan=plan)

    @property
    def rough(self) -> bool:
        """Whether blocks that are not shown to repeat stand for others: some percent of a step with late gradients."""
        return any(step.stretches.rough for step in self.steps)

    @property
    def program_bytes(self) -> int:
        """Most bytes that the step's own buffers hold at once on one rank, in the bucket that needs most."""
        return max(step.peak_bytes(self.plan) for step in self.steps)


@dataclass(frozen=True)
class _Own:
    """What a plan's own program says. ``hardware_flops``: of one rank's matrix products."""

    timed: Timed
    cost: PlanCost
    hardware_flops: float


class Evaluator:
    """Costs of a request's plans. Raises CinemeshError when its fixed fields share the GPU as it cannot be shared."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.models = request.programs.models(request.cluster)
        self.priced = 0
        self.bounded = 0
        self._held: dict[object, list[FrozenCost]] = {}
        self._last: BuiltPlan | None = None  # of a plan's own blocks, where these told
        self._owned: dict[tuple[Plan, int, FrozenCost | None], _Own] = {}

    def on(self, cluster: Cluster) -> Evaluator:
        """For the same request on another cluster."""
        other = Evaluator(replace(self.request, cluster=cluster))
        if self._last is not None:
            other._last = replace(self._last, steps=tuple(step.on(other.models) for step in self._last.steps))
        return other

    # -- time and memory of a plan --------------------------------------------------------------------------------

    def build(self, plan: Plan, samples: int, held: FrozenCost | None = None) -> BuiltPlan:
        """A plan, under no family. Raises CinemeshError where a shape forbids it."""
        steps = (Extrapolation(few, plan, self.models) for few in self.few(plan, samples))
        return BuiltPlan(plan, samples, tuple(steps), held)

    def few(self, plan: Plan, samples: int) -> list[FewBlocks]:
        """The programs that serve a plan and others, one for each bucket. Raises CinemeshError as ``build`` does."""
        return [
            self.request.programs.shared(self.request.config, plan, batch) for batch in self._batches(plan, samples)
        ]

    def own_cost(self, built: BuiltPlan) -> PlanCost:
        """By the plan's own program."""
        return self._by_own_program(built.plan, built.samples, built.held).cost

    def cost(self, built: BuiltPlan) -> PlanCost:
        """Seconds and bytes of a step, from its few blocks, or by its own program where these do not tell."""
        self.priced += 1
        try:
            return self._extrapolated(built)
        except NotSteady:
            return self.own_cost(built)

    def step_s(self, built: BuiltPlan) -> float:
        """As ``cost`` has it."""
        try:
            step_s = self.mean(step.price(built.plan).step_s for step in built.steps)
        except NotSteady:
            return self.own_cost(built).step_s
        return self._whole_s(built.plan, step_s, built.held)

    def settled(self, choice: PricedPlan) -> PricedPlan:
        """A plan priced by its own program: within 0.1 % of the whole step played, or by that play.

        Warns where that is shorter than what was taken for a lower bound.
        """
        own = self._by_own_program(choice.plan, choice.samples, choice.frozen)
        if choice.bound_s > own.cost.step_s * (1.0 + BOUND_SLACK):
            warnings.warn(
                f"{choice.plan.to_text()}: a step of {own.cost.step_s:.4g} s was taken to be {choice.bound_s:.4g} s at "
                "least: the search may have left out better plans",
                stacklevel=2,
            )
        return replace(
            choice,
            step_s=own.cost.step_s,
            compute_s=own.cost.compute_s,
            exposed_s=own.cost.exposed_s,
            hardware_flops=own.hardware_flops,
            peak_bytes=own.cost.peak_bytes,
            timed=own.timed,
            searched_s=choice.step_s,
            bucket_s=own.cost.bucket_s,
        )

    def _extrapolated(self, built: BuiltPlan) -> PlanCost:
        """From a plan's few blocks. Raises NotSteady where these do not tell."""
        priced = [step.price(built.plan) for step in built.steps]
        step_s, compute_s, exposed_s = (
            self.mean(getattr(p, name) for p in priced) for name in ("step_s", "compute_s", "exposed_s")
        )
        bucket_s = tuple(self._whole_s(built.plan, p.step_s, built.held) for p in priced)
        whole_s = self._whole_s(built.plan, step_s, built.held)
        return PlanCost(whole_s, compute_s, exposed_s, self.peak_bytes(built), bucket_s)

    def _by_own_program(self, plan: Plan, samples: int, held: FrozenCost | None) -> _Own:
        """From a few of its very own blocks, or from every record; once for each plan: tuning comes back to plans."""
        key = (plan, samples, held)
        if key not in self._owned:
            self._owned[key] = self._steady(plan, samples, held) or self._played(plan, samples, held)
        return self._owned[key]

    def _steady(self, plan: Plan, samples: int, held: FrozenCost | None) -> _Own | None:
        """From a few blocks, or some more; None where only the whole step can say.

        The last plan's serve others of its records, which only share the GPU otherwise.
        """
        bare, last = plan.without_streams(), self._last
        known = last is not None and (last.plan, last.samples) == (bare, samples)
        for own in [last] if known else (self._own(bare, samples, more) for more in PROVEN_BLOCKS):
            assert own is not None
            with contextlib.suppress(NotSteady):
                built = replace(own, plan=plan, held=held)
                flops = self.mean(step.hardware_flops(plan) for step in built.steps)
                found = _Own(Timed.STEADY, self._extrapolated(built), flops)
                self._last = own
                return found
        return None

    def _played(self, plan: Plan, samples: int, held: FrozenCost | None) -> _Own:
        steps = self.play(plan, samples, held)
        return _Own(Timed.PLAYED, self.cost_of(steps), self.mean(step.hardware_flops for step in steps))

    def _own(self, plan: Plan, samples: int, more: int) -> BuiltPlan:
        """A plan's very own blocks, with ``more`` for equal neighbours."""
        build, config = self.request.programs.own, self.request.config
        few = (build(config, plan, batch, more) for batch in self._batches(plan, samples))
        return BuiltPlan(plan, samples, tuple(Extrapolation(one, plan, self.models) for one in few))

    def _batches(self, plan: Plan, samples: int) -> Iterator[BatchShape]:
        """Of every bucket. Raises CinemeshError where a shape forbids the plan."""
        for batch in self.request.batches(samples):
            check(self.request.config, plan, batch)
            yield batch

    def play(self, plan: Plan, samples: int, held: FrozenCost | None = None) -> list[PlayedStep]:
        """The whole step on every bucket, record by record. Raises CinemeshError for a plan that cannot be."""
        return list(self.plays(plan, samples, held))

    def plays(self, plan: Plan, samples: int, held: FrozenCost | None = None) -> Iterator[PlayedStep]:
        """As ``play``, one after the other: each is large."""
        whole, config, batches = self.request.programs.whole, self.request.config, self.request.batches(samples)
        for batch in batches:
            program = whole(config, plan, batch, self.models.cluster.backend)
            yield play_program(program, batch, self.models, held, graphs=len(batches))

    def play_held(self, plan: Plan, samples: int) -> list[PlayedStep]:
        """As ``play``, with the encoders held in the fastest way that fits beside the plan, or else in the smallest."""
        steps = self.play(plan, samples)
        ways = [way for way in self.encoders(plan, samples) if way is not None]
        if not ways:
            return steps
        spare = min(step.footprint.limit_bytes - step.footprint.peak_bytes for step in steps)
        smallest = min(ways, key=lambda way: way.bytes)
        return self.play(plan, samples, next((way for way in ways if way.bytes <= spare), smallest))

    def cost_of(self, steps: Sequence[PlayedStep]) -> PlanCost:
        """Of what ``play`` gave."""
        return PlanCost(
            self.mean(step.step_s for step in steps),
            self.mean(step.tape.compute_s for step in steps),
            self.mean(step.timeline.total_exposed_s for step in steps),
            max(step.footprint.peak_bytes for step in steps),
            tuple(step.step_s for step in steps),
        )

    def bound_s(self, built: BuiltPlan) -> float:
        """A lower bound of the step."""
        return self.placed_bound_s(built, groups_of(built.plan, self.request.cluster), built.held)

    def placed_bound_s(self, built: BuiltPlan, groups: Groups, held: FrozenCost | None) -> float:
        """The same where the plan's axes lie on the network as ``groups`` tell, beside such encoders."""
        self.bounded += 1
        try:
            bound = self.mean(step.bound_s(built.plan, groups) for step in built.steps)
        except NotSteady:
            bound = 0.0
        return self._whole_s(built.plan, bound, held)

    def _whole_s(self, plan: Plan, step_s: float, held: FrozenCost | None) -> float:
        """With the encoders, and the stragglers of all ranks."""
        return (step_s + (held.seconds if held else 0.0)) * self.request.cluster.spread.factor(plan.world_size)

    def mean(self, values: Iterable[float]) -> float:
        """Over the buckets, by weight."""
        weights = [bucket.weight for bucket in self.request.buckets]
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    # -- memory ---------------------------------------------------------------------------------------------------

    def peak_bytes(self, built: BuiltPlan) -> int:
        """All that one rank holds at once: the program's own, the encoders, and what no program owns."""
        held = built.held.bytes if built.held else 0
        return built.program_bytes + held + self.outside_bytes(built.plan)

    def outside_bytes(self, plan: Plan) -> int:
        """What no program owns."""
        return sum(outside(self.request.cluster, plan, len(self.request.buckets)).values())

    def limit_bytes(self, plan: Plan) -> float:
        """What the program's own buffers, and the encoders, may take of one device."""
        return self.request.cluster.memory.usable_bytes - self.outside_bytes(plan)

    def encoders(self, plan: Plan, samples: int) -> Sequence[FrozenCost | None]:
        """Ways to hold the frozen encoders beside a plan, the fastest first."""
        if self.request.encoders is None:
            return (None,)
        encoded = round(samples * plan.micro_batches * self.request.mean_times)  # of a mean step
        key = (plan.dp_shard, plan.order, encoded, plan.tp, plan.cp)
        if key not in self._held:
            self._held[key] = frozen_options(plan, self.request.encoders, encoded, self.models)
        return self._held[key]
