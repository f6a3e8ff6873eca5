"""Which plan to run: branch and bound over degrees, shard group, placement and recompute (torch-free).

A family is a choice of tp, cp, samples and micro-batches. Within a family the search goes through every size of the
FSDP shard group, every placement of the axes on the network, and the lightest recompute that fits. Families, then their
recompute modes, then their variants are opened in the order of their lower bounds (``floor.py``, ``Skeleton.bound_s``),
until no bound can reach the table. With ``prune`` off everything is played: the truth that tests compare with.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import CinemeshError
from ..model.config import ModelConfig
from ..model.step import Batch, check
from ..parallel.plan import AXES, DtypePolicy, Plan
from .cluster import Cluster
from .compute import Compute
from .floor import Floor, Recompute
from .footprint import outside
from .frozen import FrozenCost, frozen_options
from .network import Network
from .skeleton import Groups, Shallow, Skeleton, groups_of

RECOMPUTE = ("none", "selective", "full")  # from least added time to least kept bytes
SHOWN = 5  # families ranked
NEAR = 0.02  # relative difference in throughput below which two plans are a near-tie; see ``error bars``


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
    def family(self) -> tuple[int, int, int, int]:
        return self.plan.tp, self.plan.cp, self.samples, self.plan.micro_batches


@dataclass(frozen=True)
class Refusal:
    """A family that is not in the table, and the number that keeps it out."""

    family: str
    reason: str


@dataclass
class Search:
    """Ranked plans, the best first, and what was refused. ``error``: relative error of a difference between plans."""

    choices: list[Choice]
    refused: list[Refusal]
    error: float
    played: int = 0
    bounded: int = 0

    @property
    def best(self) -> Choice:
        return self.choices[0]

    def near_ties(self) -> list[Choice]:
        """Plans whose throughput the model cannot tell from the best one's."""
        return [c for c in self.choices[1:] if c.samples_per_s >= (1.0 - self.error) * self.best.samples_per_s]


def divisors(value: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(value) + 1) if value % d == 0]
    return sorted({*small, *(value // d for d in small)})


def _everywhere(request: Request) -> Plan:
    """The fixed fields on degrees that allow every overlap; ``with_degrees`` drops those that others cannot have."""
    searched = (*AXES, "recompute", "order", "micro_batches")
    fixed = {name: value for name, value in request.fixed.items() if name not in searched}
    values: dict[str, Any] = {"dtype": request.dtype, "prefetch": 1, "grad_units": 2} | fixed
    return Plan(tp=2, cp=2, dp_shard=2, **values)


@dataclass(frozen=True)
class _Variant:
    """A plan that can be played: a lower bound of its step, and its peak with the frozen encoders."""

    bound_s: float
    plan: Plan
    peak_bytes: int
    frozen: FrozenCost | None


class _Family:
    """Variants of one choice of tp, cp, samples and micro-batches."""

    def __init__(self, planner: Planner, tp: int, cp: int, samples: int, micro_batches: int) -> None:
        self.planner = planner
        self.request = planner.request
        self.samples = samples
        self.data_ranks = self.request.gpus // (tp * cp)
        self.plan = _everywhere(self.request).with_degrees(tp=tp, cp=cp, dp_shard=self.data_ranks)
        self.plan = replace(self.plan, micro_batches=micro_batches)
        self.least_peak = 0
        self._placements: dict[tuple[int, int], list[tuple[tuple[str, ...], Groups]]] = {}
        self._shallow: dict[bool, list[Shallow]] = {}
        self._skeletons: dict[tuple[object, ...], list[Skeleton]] = {}

    @property
    def name(self) -> str:
        text = f"tp={self.plan.tp} cp={self.plan.cp}"
        if self.samples > 1:
            text += f" samples={self.samples}"
        if self.plan.micro_batches > 1:
            text += f" micro_batches={self.plan.micro_batches}"
        return text

    def global_batch(self) -> int:
        return self.data_ranks * self.samples * self.plan.micro_batches

    def check(self) -> None:
        for bucket in self.request.buckets:
            check(self.request.config, self.plan, Batch(self.samples, bucket.latent))

    def skeletons(self, plan: Plan) -> list[Skeleton]:
        """One for each bucket."""
        alone = plan.dp_shard * plan.cp == 1
        if alone not in self._shallow:
            self._shallow[alone] = [shallow.on(plan) for shallow in self.planner.shallow(plan, self.samples)]
        key = (alone, plan.recompute, plan.prefetch)
        if key not in self._skeletons:
            self._skeletons[key] = [
                Skeleton(shallow, plan, self.planner.compute, self.request.cluster) for shallow in self._shallow[alone]
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
                groups = groups_of(replace(plan, order=order), cluster)  # type: ignore[arg-type]
                distinct.setdefault(tuple(groups.values()), (order, groups))  # type: ignore[arg-type]
            self._placements[key] = list(distinct.values())
        return self._placements[key]

    def recomputes(self) -> tuple[Recompute, ...]:
        """From the least added work to the least kept bytes; those that cannot fit, whatever is sharded, left out."""
        fixed = self.request.fixed
        if "recompute" in fixed:
            return (fixed["recompute"],)  # type: ignore[return-value]
        limit = self.planner.limit_bytes(self.plan)
        return tuple(name for name in RECOMPUTE[:-1] if self._floor_bytes(name) <= limit) + RECOMPUTE[-1:]

    def _floor_bytes(self, recompute: Recompute) -> float:
        parts = self.plan.tp * self.plan.cp
        floors = self.planner.floors(self.samples)
        return max(floor.peak_bytes(recompute, parts, self.data_ranks) for floor in floors)

    def floor_s(self, recompute: Recompute) -> float:
        """A lower bound of the step of every variant that recomputes so, before any of them is built."""
        plan = self.plan

        def bound(floor: Floor) -> float:
            alone, busy = floor.communication_s(recompute, plan.tp, plan.cp, plan.micro_batches)
            return max(floor.compute_s(recompute, plan.tp * plan.cp, plan.micro_batches) + alone, busy)

        return self.planner.mean(map(bound, self.planner.floors(self.samples)))

    def peak_bytes(self, plan: Plan) -> int:
        return max(skeleton.peak_bytes(plan) for skeleton in self.skeletons(plan))

    def too_big(self, recompute: Recompute) -> bool:
        """Whether a family with the same tp that splits further did not fit either: then this one is not built."""
        plan = self.plan
        key = (plan.tp, self.samples, plan.micro_batches, recompute)
        return plan.cp <= self.planner.too_big.get(key, 0)

    def expand(self, recompute: Recompute, groups: list[int]) -> tuple[list[_Variant], list[int]]:
        """Variants of one recompute mode over shard groups of these sizes, and the sizes that do not fit.

        A larger shard group never needs more memory, so the smallest one that fits is found by bisection.
        """
        limit = self.planner.limit_bytes(self.plan)
        mode = replace(self.plan, recompute=recompute)
        plans = [mode.with_degrees(dp_shard=n, dp_replicate=self.data_ranks // n) for n in groups]

        def need(plan: Plan) -> int:
            held = min(o.bytes if o else 0 for o in self.planner.frozen(plan, self.samples))
            return self.peak_bytes(plan) + held

        self.least_peak = need(plans[-1])
        first = bisect_left(plans, True, key=lambda plan: need(plan) <= limit)
        if first == len(plans):
            key = (self.plan.tp, self.samples, self.plan.micro_batches, recompute)
            self.planner.too_big[key] = max(self.plan.cp, self.planner.too_big.get(key, 0))
        variants = [variant for plan in plans[first:] for variant in self._placed(plan, limit)]
        return variants, groups[:first]

    def _placed(self, plan: Plan, limit: float) -> Iterator[_Variant]:
        """One plan in every placement that differs on the network, with the fastest way to hold the encoders."""
        peak = self.peak_bytes(plan)
        for order, groups in self.placements(plan):
            placed = replace(plan, order=order)
            fits = [o for o in self.planner.frozen(placed, self.samples) if peak + (o.bytes if o else 0) <= limit]
            option = fits[0]
            seconds, bytes_ = (option.seconds, option.bytes) if option else (0.0, 0)
            yield _Variant(self.planner.bound_s(self, placed, groups) + seconds, placed, peak + bytes_, option)


class Planner:
    """What all families of one request share: prices, floors, shallow programs."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.compute = Compute(request.cluster)
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
        groups = [("tp",), ("cp",), ("dp_shard", "cp"), ("dp_shard", "cp", "tp"), ("dp_replicate",)]
        communicators = sum(plan.size(axes) > 1 for axes in groups) + 2  # gathers and reductions apart; the whole job
        return sum(outside(self.request.cluster, communicators).values())

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

    def bound_s(self, family: _Family, plan: Plan, groups: Groups) -> float:
        self.bounded += 1
        return self.mean(skeleton.bound_s(plan, self.network, groups) for skeleton in family.skeletons(plan))

    def shallow(self, plan: Plan, samples: int) -> list[Shallow]:
        """The programs that serve all families with as many samples and micro-batches; one for each bucket."""
        alone = plan.dp_shard * plan.cp == 1
        key = (alone, samples, plan.micro_batches)
        if key not in self._shallow:
            model = _everywhere(self.request).with_degrees(**({"cp": 1, "dp_shard": 1} if alone else {}))
            model = replace(model, micro_batches=plan.micro_batches)
            self._shallow[key] = [
                Shallow(self.request.config, model, Batch(samples, bucket.latent)) for bucket in self.request.buckets
            ]
        return self._shallow[key]

    def floors(self, samples: int) -> list[Floor]:
        """One for each bucket."""
        if samples not in self._floors:
            plan = _everywhere(self.request)
            self._floors[samples] = [
                Floor(shallow, self.compute, self.network, self.request.cluster)
                for shallow in self.shallow(plan, samples)
            ]
        return self._floors[samples]

    def mean(self, values: Iterator[float]) -> float:
        weights = [bucket.weight for bucket in self.request.buckets]
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    def play(self, family: _Family, variant: _Variant) -> Choice:
        self.played += 1
        plan, request = variant.plan, self.request
        priced = [s.price(plan, self.network, request.cluster) for s in family.skeletons(plan)]
        held = variant.frozen.seconds if variant.frozen else 0.0
        spread = request.cluster.spread.factor(plan.world_size)
        return Choice(
            plan=plan,
            samples=family.samples,
            step_s=(self.mean(p.step_s for p in priced) + held) * spread,
            compute_s=self.mean(p.compute_s for p in priced),
            bound_s=variant.bound_s * spread,
            peak_bytes=variant.peak_bytes + self.outside_bytes(plan),
            global_batch=family.global_batch(),
            frozen=variant.frozen,
        )


def _families(planner: Planner, refused: list[Refusal]) -> list[_Family]:
    request = planner.request
    families: list[_Family] = []
    fixed = request.fixed
    for tp in divisors(request.gpus):
        if fixed.get("tp", tp) != tp or tp > request.config.heads:
            continue
        for cp in divisors(request.gpus // tp):
            if fixed.get("cp", cp) != cp:
                continue
            family = _Family(planner, tp, cp, 1, 1)
            try:
                family.check()
            except CinemeshError as error:
                refused.append(Refusal(family.name, str(error).partition(";")[0]))
                if "tokens" not in str(error):
                    break  # no cp mends it
                continue
            families.extend(_batches(planner, tp, cp, refused))
    return families


def _batches(planner: Planner, tp: int, cp: int, refused: list[Refusal]) -> Iterator[_Family]:
    """Families of one (tp, cp): how the samples of a step are dealt out."""
    request = planner.request
    data_ranks = request.gpus // (tp * cp)
    fixed = request.fixed
    if request.global_batch is None:
        yield _Family(planner, tp, cp, request.samples, int(fixed.get("micro_batches", 1)))  # type: ignore[arg-type]
        return
    if request.global_batch % data_ranks:
        refused.append(
            Refusal(f"tp={tp} cp={cp}", f"global batch({request.global_batch}) % data ranks({data_ranks}) != 0")
        )
        return
    share = request.global_batch // data_ranks
    for micro_batches in divisors(share):
        if fixed.get("micro_batches", micro_batches) == micro_batches:
            yield _Family(planner, tp, cp, share // micro_batches, micro_batches)


@dataclass(order=True)
class _Todo:
    """Something that the search may open: a recompute mode of a family, or one variant to play.

    ``per_sample_s`` is a lower bound of what it can lead to.
    """

    per_sample_s: float
    number: int
    family: _Family = field(compare=False)
    modes: tuple[Recompute, ...] = field(compare=False, default=())
    groups: list[int] = field(compare=False, default_factory=list)
    variant: _Variant | None = field(compare=False, default=None)


def search(request: Request) -> Search:
    """Ranked plans for a request: the best variant of each family.

    Whatever has the lowest bound is opened first; the search ends when no bound is below the last plan shown.
    Raises CinemeshError when no plan fits: it says which came nearest and what would fit.
    """
    planner = Planner(request)
    refused: list[Refusal] = []
    spread = request.cluster.spread.factor(request.gpus)
    number = itertools.count()
    heap: list[_Todo] = []

    def push(family: _Family, step_s: float, **what: Any) -> None:
        per_sample_s = step_s * spread / family.global_batch()
        heapq.heappush(heap, _Todo(per_sample_s, next(number), family, **what))

    families = _families(planner, refused)
    for family in reversed(families):  # of equal floors, what splits most is opened first: it is the first to fit
        modes = family.recomputes()
        push(family, family.floor_s(modes[0]), modes=modes, groups=family.shard_groups())
    best: dict[_Family, Choice] = {}

    def last_shown_s() -> float:
        """Seconds a sample of the last plan shown, as far as known."""
        times = sorted(choice.step_s / choice.global_batch for choice in best.values())
        return times[request.shown - 1] if len(times) >= request.shown else math.inf

    worst = math.inf
    bounds: dict[_Family, float] = {}
    while heap:
        todo = heapq.heappop(heap)
        family = todo.family
        if request.prune and todo.per_sample_s >= worst:
            bounds.setdefault(family, todo.per_sample_s)
            continue
        if todo.variant is not None:
            known = best.get(family)
            if request.prune and known and todo.per_sample_s >= known.step_s / known.global_batch:
                continue
            choice = planner.play(family, todo.variant)
            if known is None or (choice.step_s, repr(choice.plan)) < (known.step_s, repr(known.plan)):
                best[family] = choice
                worst = last_shown_s()
            continue
        if family.too_big(todo.modes[0]):
            variants, unfit = [], todo.groups
        else:
            variants, unfit = family.expand(todo.modes[0], todo.groups)
        for variant in variants:
            push(family, variant.bound_s, variant=variant)
        if unfit and todo.modes[1:]:
            push(family, family.floor_s(todo.modes[1]), modes=todo.modes[1:], groups=unfit)
    if not best:
        refused += [_too_big(planner, family) for family in families]
        raise CinemeshError(_nothing_fits(request, refused))
    ranked = sorted(best.items(), key=lambda item: (item[1].step_s / item[1].global_batch, repr(item[1].plan)))
    shown = {family for family, _ in ranked[: request.shown]}
    for family in families:
        if family in shown:
            continue
        if family in best:
            behind = best[family].step_s / best[family].global_batch / worst - 1.0
            refused.append(Refusal(family.name, f"{behind:.1%} slower for a sample than the last plan shown"))
        elif family in bounds:
            behind = bounds[family] / worst - 1.0
            refused.append(Refusal(family.name, f"at least {behind:.1%} slower for a sample than the last plan shown"))
        else:
            refused.append(_too_big(planner, family))
    return Search([choice for _, choice in ranked[: request.shown]], refused, NEAR, planner.played, planner.bounded)


def _too_big(planner: Planner, family: _Family) -> Refusal:
    limit = planner.limit_bytes(family.plan)
    return Refusal(
        family.name,
        f"needs {family.least_peak / 1e9:.1f} GB even with full recompute; {limit / 1e9:.1f} GB are free",
    )


def _nothing_fits(request: Request, refused: list[Refusal]) -> str:
    shapes = ", ".join("x".join(map(str, b.latent)) for b in request.buckets)
    nearest = next((r for r in refused if "GB" in r.reason), refused[0] if refused else None)
    why = f" (nearest: {nearest.family}: {nearest.reason})" if nearest else ""
    return (
        f"no plan of {request.gpus} GPUs of {request.cluster.name} runs {request.config.name} on {shapes}{why}; "
        "use more GPUs, a smaller latent, or a number of GPUs with more divisors"
    )
