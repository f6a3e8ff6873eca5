"""What a plan costs: the one place where modes, buckets, encoders and stragglers come together (torch-free).

A step is priced from a few of its blocks, or played whole (``Effort``). Search, tuning, the choice of kept activations
and explanations all ask here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

from ...kernels.ops import OPS
from ...model.inputs import BatchShape
from ...model.step import check
from ...parallel.ir.plan import Plan
from ...parallel.ir.program import Program
from ...parallel.ir.records import Op
from ..prices.encoders import FrozenCost, frozen_options
from ..prices.footprint import outside
from ..prices.models import PriceModels
from ..prices.network import Groups, group_of, groups_of
from ..prices.played import PlayedStep, play_step
from .extrapolate import STEADY, STEADY_BLOCKS, Extrapolation
from .few_blocks import FewBlocks
from .request import Request

ROUGHLY = 0.02  # relative difference of two blocks' times up to which a few blocks tell what pays


class Effort(Enum):
    """How a step is priced; the first two raise NotSteady where only the whole step can say."""

    ROUGH = "a few blocks, steady to 2 %"
    STEADY = "a few blocks, steady"
    FAST = "a few blocks where they are steady, else all"
    EXACT = "every record of every block"


@dataclass(frozen=True)
class PlanCost:
    """Of one step: mean seconds over the buckets by weight, encoders and stragglers included; bytes of one rank."""

    step_s: float
    compute_s: float
    peak_bytes: int


@dataclass(frozen=True)
class BuiltPlan:
    """A plan with the few blocks that price it: by recompute mode, one program a bucket.

    The same programs serve a plan of another shard group, placement, margin, thread blocks or priorities (``under``).
    Without programs a plan can only be played whole. ``held``: the encoders beside it.
    """

    plan: Plan
    samples: int
    steps: tuple[Sequence[Extrapolation], ...]
    held: FrozenCost | None = None

    def under(self, plan: Plan) -> BuiltPlan:
        """Another plan of the same records."""
        return replace(self, plan=plan)

    @cached_property
    def parts(self) -> list[tuple[float, Plan, Sequence[Extrapolation]]]:
        """Of each recompute mode: its share of the blocks, its plan, and its programs."""
        split = split_modes(self.plan, self.steps[0][0].few.config.layers)
        return [(share, plan, steps) for (share, plan), steps in zip(split, self.steps, strict=True)]

    @property
    def program_bytes(self) -> int:
        """Most bytes that the step's own buffers hold at once on one rank, in the bucket that needs most."""
        (_, plan, steps), *rest = self.parts
        if not rest:
            return max(step.peak_bytes(plan) for step in steps)
        pairs = zip(steps, rest[0][2], strict=True)
        return max(mixed_peak_bytes(heavy, light, plan, self.plan.last_blocks) for heavy, light in pairs)


def split_modes(plan: Plan, layers: int) -> list[tuple[float, Plan]]:
    """A plan of two recompute modes as plans of one each, with their share of the blocks."""
    if plan.recompute_last is None:
        return [(1.0, plan)]
    share = plan.last_blocks / layers
    first = replace(plan, recompute_last=None, last_blocks=0)
    return [(1.0 - share, first), (share, replace(first, recompute=plan.recompute_last))]


def mixed_peak_bytes(heavy: Extrapolation, light: Extrapolation, plan: Plan, blocks: int) -> int:
    """Peak of a step whose last ``blocks`` blocks recompute as ``light`` does and the others as ``heavy``.

    What each mode needs beside kept bytes is taken from the mode that needs more.
    """
    layers, peak = heavy.few.config.layers, heavy.peak_bytes(plan)
    above = light.peak_bytes(plan) - layers * light.kept_bytes - (peak - layers * heavy.kept_bytes)
    return peak + blocks * (light.kept_bytes - heavy.kept_bytes) + max(above, 0)


class Evaluator:
    """Costs of a request's plans. Raises CinemeshError when its fixed fields share the GPU as it cannot be shared."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.models = PriceModels.of(request.cluster)
        self.played = 0
        self.bounded = 0
        self._held: dict[object, list[FrozenCost]] = {}

    # -- time and memory of a plan --------------------------------------------------------------------------------

    def build(self, plan: Plan, samples: int, held: FrozenCost | None = None) -> BuiltPlan:
        """As many blocks as it takes to see whether they are steady. Raises CinemeshError where a shape forbids it."""
        config, few = self.request.config, list[FewBlocks]()
        modes = [of for _, of in split_modes(plan, config.layers)]
        for bucket in self.request.buckets:
            batch = BatchShape(samples, bucket.latent)
            check(config, plan, batch)
            few.append(FewBlocks.build(config, modes[0], batch, blocks=STEADY_BLOCKS + plan.prefetch - 1))
        steps = tuple([Extrapolation(one, of, self.models) for one in few] for of in modes)
        return BuiltPlan(plan, samples, steps, held)

    def cost(self, built: BuiltPlan, effort: Effort = Effort.FAST) -> PlanCost:
        """Seconds and bytes of a step. Raises NotSteady where so little effort cannot tell."""
        self.played += 1
        if effort is Effort.EXACT:
            return self.cost_of(self.play(built.plan, built.samples, built.held))
        step_s = compute_s = 0.0
        for share, plan, steps in built.parts:
            if effort is Effort.FAST:
                priced = [step.price(plan) for step in steps]
            else:
                steady = ROUGHLY if effort is Effort.ROUGH else STEADY
                priced = [step.steady_price(plan, steady) for step in steps]
            step_s += share * self.mean(p.step_s for p in priced)
            compute_s += share * self.mean(p.compute_s for p in priced)
        return PlanCost(self._whole_s(built.plan, step_s, built.held), compute_s, self.peak_bytes(built))

    def play(self, plan: Plan, samples: int, held: FrozenCost | None = None) -> list[PlayedStep]:
        """The whole step on every bucket, record by record. Raises CinemeshError for a plan that cannot be."""
        config, batches = self.request.config, (BatchShape(samples, bucket.latent) for bucket in self.request.buckets)
        return [play_step(config, plan, batch, self.models, held) for batch in batches]

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
            max(step.footprint.peak_bytes for step in steps),
        )

    def bound_s(self, built: BuiltPlan) -> float:
        """A lower bound of the step."""
        return self.placed_bound_s(built, groups_of(built.plan, self.request.cluster), built.held)

    def placed_bound_s(self, built: BuiltPlan, groups: Groups, held: FrozenCost | None) -> float:
        """The same where the plan's axes lie on the network as ``groups`` tell, beside such encoders."""
        self.bounded += 1
        bound = sum(
            share * self.mean(step.bound_s(plan, groups) for step in steps) for share, plan, steps in built.parts
        )
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
        return sum(outside(self.request.cluster, plan).values())

    def limit_bytes(self, plan: Plan) -> float:
        """What the program's own buffers, and the encoders, may take of one device."""
        return self.request.cluster.memory.usable_bytes - self.outside_bytes(plan)

    def encoders(self, plan: Plan, samples: int) -> Sequence[FrozenCost | None]:
        """Ways to hold the frozen encoders beside a plan, the fastest first."""
        if not self.request.encoders:
            return (None,)
        key = (plan.dp_shard, plan.order, samples * plan.micro_batches, plan.tp, plan.cp)
        if key not in self._held:
            tokens = {encoder.name: encoder.tokens for encoder in self.request.config.encoders}
            self._held[key] = frozen_options(plan, tokens, samples * plan.micro_batches, self.models)
        return self._held[key]

    # -- a record -------------------------------------------------------------------------------------------------

    def record_s(self, plan: Plan) -> Callable[[Program, Op], float]:
        """Seconds of a record alone, as the choice of kept activations asks for them."""

        def seconds(program: Program, op: Op) -> float:
            if op.kind in OPS:
                return self.models.compute.op_s(program, op)
            if op.is_wait:
                return 0.0
            group = group_of(self.request.cluster, plan, op.axes)
            payload = program.payload_bytes(op)
            return self.models.network.collective(op.kind, payload, group, plan.ctas(op.axes)).seconds

        return seconds
