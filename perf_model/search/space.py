"""Families and their variants: what the search opens (torch-free).

A family is a choice of tp, cp, samples and micro-batches. Its variants differ in the size of the FSDP shard group, the
placement of the axes on the network, and how much is recomputed: the lightest mode that fits, and in as many of the
last blocks as the memory left over allows, the next lighter one.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...model.config import ModelConfig
from ...model.inputs import BatchShape
from ...model.step import check
from ...parallel.ir.fields import AXES, DtypePolicy
from ...parallel.ir.layout import HEADS
from ...parallel.ir.plan import Plan
from ..clusters.cluster import Cluster
from ..prices.compute import Compute
from ..prices.encoders import FrozenCost, frozen_options
from ..prices.footprint import outside
from ..prices.network import Groups, Network, groups_of
from ..prices.timeline import beyond_server, check_fused
from .extrapolate import Skeleton
from .few_blocks import Shallow
from .lower_bound import Floor, Recompute
from .refusals import FamilyKey

Mode = tuple[Recompute, Recompute | None]  # how blocks recompute, and what as many of the last ones as fit do instead
ATTENTION: Recompute = ("o", "lse")  # self-attention is what costs most to run again, and its output is small
MODES: tuple[Mode, ...] = (  # most kept bytes first
    ("none", None),
    ("selective", "none"),
    (ATTENTION, "selective"),
    ("full", ATTENTION),
)
SHOWN = 5  # families ranked


@dataclass(frozen=True)
class Bucket:
    """A sample shape: latent (T, H, W), and its share of the steps."""

    latent: tuple[int, int, int]
    weight: float = 1.0


@dataclass(frozen=True)
class Request:
    """What to plan for.

    ``fixed`` holds plan fields that are given by hand; ``samples`` those of one micro-batch on one data rank, used when
    no global batch is asked for; ``encoders``: the frozen text encoders run in the loop.
    """

    config: ModelConfig
    buckets: tuple[Bucket, ...]
    cluster: Cluster
    gpus: int
    global_batch: int | None = None
    samples: int = 1
    dtype: DtypePolicy = "bf16"
    fixed: dict[str, object] = field(default_factory=dict)
    encoders: bool = False
    shown: int = SHOWN
    prune: bool = True


@dataclass(frozen=True)
class Choice:
    """One plan with its price. ``step_s`` is the mean over the buckets by weight; bytes are of one rank."""

    plan: Plan
    samples: int
    step_s: float
    compute_s: float
    bound_s: float
    peak_bytes: int
    global_batch: int
    frozen: FrozenCost | None = None

    @property
    def samples_per_s(self) -> float:
        return self.global_batch / self.step_s

    @property
    def exposed(self) -> float:
        """Share of the step that compute alone does not explain."""
        return 1.0 - self.compute_s / self.step_s

    @property
    def family(self) -> FamilyKey:
        return FamilyKey(self.plan.tp, self.plan.cp, self.samples, self.plan.micro_batches)


def divisors(value: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(value) + 1) if value % d == 0]
    return sorted({*small, *(value // d for d in small)})


def everywhere(request: Request) -> Plan:
    """The fixed fields on degrees that allow every overlap; ``with_degrees`` drops those that others cannot have."""
    searched = (*AXES, "recompute", "order", "micro_batches")
    fixed = {name: value for name, value in request.fixed.items() if name not in searched}
    values: dict[str, Any] = {"dtype": request.dtype, "prefetch": 1, "grad_units": 2} | fixed
    return Plan(tp=2, cp=2, dp_shard=2, **values)


def parts(plan: Plan, layers: int) -> list[tuple[float, Plan]]:
    """A plan of two recompute modes as plans of one each, with their share of the blocks."""
    if plan.recompute_last is None:
        return [(1.0, plan)]
    share = plan.last_blocks / layers
    first = replace(plan, recompute_last=None, last_blocks=0)
    return [(1.0 - share, first), (share, replace(first, recompute=plan.recompute_last))]


def mixed_peak_bytes(heavy: Skeleton, light: Skeleton, plan: Plan, blocks: int, layers: int) -> int:
    """Peak of a step whose last ``blocks`` blocks recompute as ``light`` does and the others as ``heavy``.

    What each mode needs beside kept bytes is taken from the mode that needs more.
    """
    peak = heavy.peak_bytes(plan)
    above = light.peak_bytes(plan) - layers * light.kept_bytes - (peak - layers * heavy.kept_bytes)
    return peak + blocks * (light.kept_bytes - heavy.kept_bytes) + max(above, 0)


@dataclass(frozen=True)
class Variant:
    """A plan that can be played: a lower bound of its step, and its peak with the frozen encoders."""

    bound_s: float
    plan: Plan
    peak_bytes: int
    frozen: FrozenCost | None


class Family:
    """Variants of one choice of tp, cp, samples and micro-batches."""

    def __init__(self, prices: Prices, key: FamilyKey) -> None:
        self.prices = prices
        self.request = prices.request
        self.key, self.samples = key, key.samples
        self.data_ranks = self.request.gpus // key.model_parallel
        self.plan = everywhere(self.request).with_degrees(tp=key.tp, cp=key.cp, dp_shard=self.data_ranks)
        self.plan = replace(self.plan, micro_batches=key.micro_batches)
        self.least_peak = 0
        self._placements: dict[tuple[int, int], list[tuple[tuple[str, ...], Groups]]] = {}
        self._shallow: dict[bool, list[Shallow]] = {}
        self._skeletons: dict[tuple[object, ...], list[Skeleton]] = {}

    @property
    def global_batch(self) -> int:
        return self.key.global_batch(self.request.gpus)

    def check_placement(self) -> None:
        """Raise CinemeshError where a group of tp would lie on more servers than fused records reach."""
        order: Any = self.request.fixed.get("order", self.plan.order)
        check_fused(replace(self.plan, order=order), self.request.cluster)

    def check_shapes(self) -> None:
        """Raise CinemeshError where a degree does not divide what it splits of the model or of a bucket."""
        for bucket in self.request.buckets:
            check(self.request.config, self.plan, BatchShape(self.samples, bucket.latent))

    def skeletons(self, plan: Plan) -> list[Skeleton]:
        """One for each bucket."""
        alone = plan.dp_shard * plan.cp == 1
        if alone not in self._shallow:
            self._shallow[alone] = [shallow.on(plan) for shallow in self.prices.shallow(plan, self.samples)]
        key = (alone, plan.recompute, plan.prefetch)
        if key not in self._skeletons:
            self._skeletons[key] = [
                Skeleton(shallow, plan, self.prices.compute, self.request.cluster) for shallow in self._shallow[alone]
            ]
        return self._skeletons[key]

    # -- variants -------------------------------------------------------------------------------------------------

    def shard_groups(self) -> list[int]:
        fixed = self.request.fixed
        if "dp_shard" in fixed:
            return [n for n in divisors(self.data_ranks) if n == fixed["dp_shard"]]
        if "dp_replicate" in fixed:
            return [n for n in divisors(self.data_ranks) if self.data_ranks // n == fixed["dp_replicate"]]
        return divisors(self.data_ranks)

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
                if HEADS in groups and beyond_server(plan, cluster, groups[HEADS]):
                    continue
                distinct.setdefault(tuple(groups.values()), (order, groups))  # type: ignore[arg-type]
            self._placements[key] = list(distinct.values())
        return self._placements[key]

    def modes(self) -> tuple[Mode, ...]:
        """From the least added work to the least kept bytes; those that cannot fit, whatever is sharded, left out."""
        fixed = self.request.fixed
        if "recompute" in fixed:
            return ((fixed["recompute"], None),)  # type: ignore[return-value]
        limit = self.prices.limit_bytes(self.plan)
        return tuple(mode for mode in MODES[:-1] if self.floor_bytes(mode[0]) <= limit) + MODES[-1:]

    def floor_bytes(self, recompute: Recompute) -> float:
        return max(floor.peak_bytes(recompute, self.plan) for floor in self.prices.floors(self.samples))

    def floor_s(self, mode: Mode) -> float:
        """A lower bound of the step of every variant of a mode, before any of them is built."""
        recompute, lighter = mode
        if lighter is None:
            return self._floor_s(recompute)
        spare = self.prices.limit_bytes(self.plan) - self.floor_bytes(recompute)
        each = min(f.kept_bytes(lighter) - f.kept_bytes(recompute) for f in self.prices.floors(self.samples))
        blocks = spare * self.plan.tp * self.plan.cp / each
        share = min(1.0, max(0.0, blocks / self.request.config.layers))
        return sum(part * self._floor_s(of) for part, of in ((1.0 - share, recompute), (share, lighter)) if part > 0.0)

    def _floor_s(self, recompute: Recompute) -> float:
        plan, floors = self.plan, self.prices.floors(self.samples)
        return self.prices.mean(f.step_s(recompute, plan.tp, plan.cp, plan.micro_batches) for f in floors)

    def lightened(self, plan: Plan, lighter: Recompute, limit: float) -> tuple[Plan, int]:
        """The plan with as many last blocks on the lighter mode as fit, and its peak bytes."""
        layers = self.request.config.layers
        pairs = list(zip(self.skeletons(plan), self.skeletons(replace(plan, recompute=lighter)), strict=True))
        heavy = self.peak_bytes(plan)
        each = max(light.kept_bytes - heavy.kept_bytes for heavy, light in pairs)
        blocks = 0
        if each > 0:
            above = max(mixed_peak_bytes(heavy, light, plan, 1, layers) for heavy, light in pairs) - heavy
            blocks = max(0, min(layers - 1, 1 + int((limit - heavy - above) // each)))
        if blocks == 0:
            return plan, heavy
        peak = max(mixed_peak_bytes(heavy, light, plan, blocks, layers) for heavy, light in pairs)
        return replace(plan, recompute_last=lighter, last_blocks=blocks), peak

    def peak_bytes(self, plan: Plan) -> int:
        return max(skeleton.peak_bytes(plan) for skeleton in self.skeletons(plan))

    def too_big(self, recompute: Recompute) -> bool:
        """Whether a family with the same tp that splits further did not fit either: then this one is not built."""
        plan = self.plan
        key = (plan.tp, self.samples, plan.micro_batches, recompute)
        return plan.cp <= self.prices.too_big.get(key, 0)

    def expand(self, mode: Mode, groups: list[int]) -> tuple[list[Variant], list[int]]:
        """Variants of one mode over shard groups of these sizes, and the sizes that do not fit.

        A larger shard group never needs more memory, so the smallest one that fits is found by bisection.
        """
        recompute, lighter = mode
        base = replace(self.plan, recompute=recompute)
        plans = [base.with_degrees(dp_shard=n, dp_replicate=self.data_ranks // n) for n in groups]

        def held(plan: Plan) -> int:
            return min(o.bytes if o else 0 for o in self.prices.frozen(plan, self.samples))

        def need(plan: Plan) -> int:
            return self.peak_bytes(plan) + held(plan)

        self.least_peak = need(plans[-1])
        first = bisect_left(plans, True, key=lambda plan: need(plan) <= self.prices.limit_bytes(plan))
        if first == len(plans):
            key = (self.plan.tp, self.samples, self.plan.micro_batches, recompute)
            self.prices.too_big[key] = max(self.plan.cp, self.prices.too_big.get(key, 0))
        variants: list[Variant] = []
        for plan in plans[first:]:
            peak, limit = self.peak_bytes(plan), self.prices.limit_bytes(plan)
            if lighter is not None:
                plan, peak = self.lightened(plan, lighter, limit - held(plan))
            variants += self._placed(plan, peak, limit)
        return variants, groups[:first]

    def _placed(self, plan: Plan, peak: int, limit: float) -> Iterator[Variant]:
        """One plan in every placement that differs on the network, with the fastest way to hold the encoders."""
        shares = [(share, part, self.skeletons(part)) for share, part in parts(plan, self.request.config.layers)]
        for order, groups in self.placements(plan):
            placed = replace(plan, order=order)
            fits = [o for o in self.prices.frozen(placed, self.samples) if peak + (o.bytes if o else 0) <= limit]
            option = fits[0]
            seconds, bytes_ = (option.seconds, option.bytes) if option else (0.0, 0)
            yield Variant(self.prices.bound_s(shares, groups) + seconds, placed, peak + bytes_, option)


class Prices:
    """What all families of one request share: the models, floors, shallow programs.

    Raises CinemeshError when the fixed fields share the GPU as it cannot be shared.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.compute = Compute(request.cluster)
        self.compute.check(everywhere(request))
        self.network = Network(request.cluster)
        self.played = 0
        self.bounded = 0
        self._frozen: dict[object, list[FrozenCost]] = {}
        self._floors: dict[int, list[Floor]] = {}
        self._shallow: dict[object, list[Shallow]] = {}
        self.too_big: dict[object, int] = {}

    def limit_bytes(self, plan: Plan) -> float:
        """What the program's own buffers may take of one device."""
        return self.request.cluster.memory.usable_bytes - self.outside_bytes(plan)

    def outside_bytes(self, plan: Plan) -> int:
        """What no program owns."""
        return sum(outside(self.request.cluster, plan).values())

    def frozen(self, plan: Plan, samples: int) -> Sequence[FrozenCost | None]:
        """Ways to hold the frozen encoders, the fastest first."""
        if not self.request.encoders:
            return (None,)
        key = (plan.dp_shard, plan.order, samples * plan.micro_batches, plan.tp, plan.cp)
        if key not in self._frozen:
            tokens = {encoder.name: encoder.tokens for encoder in self.request.config.encoders}
            self._frozen[key] = frozen_options(
                plan, tokens, samples * plan.micro_batches, self.compute, self.network, self.request.cluster
            )
        return self._frozen[key]

    def bound_s(self, shares: list[tuple[float, Plan, list[Skeleton]]], groups: Groups) -> float:
        """A lower bound of the step of a plan's ``parts`` where its groups lie so on the network."""
        self.bounded += 1
        return sum(
            share * self.mean(skeleton.bound_s(part, self.network, groups) for skeleton in skeletons)
            for share, part, skeletons in shares
        )

    def shallow(self, plan: Plan, samples: int) -> list[Shallow]:
        """The programs that serve all families with as many samples and micro-batches; one for each bucket."""
        alone = plan.dp_shard * plan.cp == 1
        key = (alone, samples, plan.micro_batches)
        if key not in self._shallow:
            model = everywhere(self.request).with_degrees(**({"cp": 1, "dp_shard": 1} if alone else {}))
            model = replace(model, micro_batches=plan.micro_batches)
            self._shallow[key] = [
                Shallow(self.request.config, model, BatchShape(samples, bucket.latent))
                for bucket in self.request.buckets
            ]
        return self._shallow[key]

    def floors(self, samples: int) -> list[Floor]:
        """One for each bucket."""
        if samples not in self._floors:
            plan = everywhere(self.request)
            self._floors[samples] = [
                Floor(shallow, self.compute, self.network, self.request.cluster)
                for shallow in self.shallow(plan, samples)
            ]
        return self._floors[samples]

    def mean(self, values: Iterator[float]) -> float:
        weights = [bucket.weight for bucket in self.request.buckets]
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    def play(self, family: Family, variant: Variant) -> Choice:
        self.played += 1
        plan, request = variant.plan, self.request
        step_s = compute_s = 0.0
        for share, part in parts(plan, self.request.config.layers):
            priced = [s.price(part, self.network, request.cluster) for s in family.skeletons(part)]
            step_s += share * self.mean(p.step_s for p in priced)
            compute_s += share * self.mean(p.compute_s for p in priced)
        held = variant.frozen.seconds if variant.frozen else 0.0
        spread = request.cluster.spread.factor(plan.world_size)
        return Choice(
            plan=plan,
            samples=family.samples,
            step_s=(step_s + held) * spread,
            compute_s=compute_s,
            bound_s=variant.bound_s * spread,
            peak_bytes=variant.peak_bytes + self.outside_bytes(plan),
            global_batch=family.global_batch,
            frozen=variant.frozen,
        )
